"""What `python -m demo` makes of the machine that it runs on."""

from __future__ import annotations

import itertools

import pytest
import torch

from demo.__main__ import BATCH_SIZE, NUM_STEPS, TRAINING_S, choose_training, num_processes
from demo.defaults import NUM_SCENES
from demo.pace import Pace, _time, measure_pace


def test_pace_is_measured_in_both_precisions_and_leaves_the_threads() -> None:
    num_threads = torch.get_num_threads()
    paces = measure_pace(batch_size=1, num_processes=2)
    assert set(paces) == {"32", "bf16-mixed"}
    assert all(pace.step_s > 0 and pace.encode_s > 0 for pace in paces.values())
    assert torch.get_num_threads() == num_threads


def test_one_step_is_enough_of_what_is_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 8.0, 10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr("demo.pace.time.perf_counter", lambda: next(ticks))
    assert _time(lambda: None, hopeless_s=7.0) == 8.0
    assert list(ticks) == [10.0, 13.0, 20.0, 21.0]


def test_a_pace_is_the_median_without_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [50.0, 3.0, 1.0, 2.0, 9.0, 4.0]
    ticks = itertools.chain.from_iterable((0.0, second) for second in seconds)
    monkeypatch.setattr("demo.pace.time.perf_counter", lambda: next(ticks))
    assert _time(lambda: None) == 3.0


def test_a_pictures_views_are_encoded_once_however_long_a_training_is() -> None:
    batch_size, num_processes, encode_s = 32, 2, 0.5
    encoding = Pace(step_s=0.0, encode_s=encode_s)
    steps_per_epoch = NUM_SCENES / batch_size
    shares = [
        encoding.training_s(
            round(num_epochs * steps_per_epoch), batch_size=batch_size, num_processes=num_processes
        )
        / (NUM_SCENES * encode_s / num_processes)
        for num_epochs in (1, 2, 100)
    ]
    assert shares == pytest.approx([1.0, 1.5, 2.0])


@pytest.mark.parametrize(
    ("paces", "precision"),
    [({"32": Pace(0.3, 0.01), "bf16-mixed": Pace(0.7, 0.001)}, "32"),
     ({"32": Pace(0.9, 0.01), "bf16-mixed": Pace(0.5, 0.02)}, "bf16-mixed")],
)  # fmt: skip
def test_a_slow_cpu_takes_its_faster_precision_and_as_many_steps_as_fit(
    paces: dict[str, Pace], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("demo.pace.measure_pace", lambda batch_size, num_processes: paces)
    chosen, num_steps = choose_training()
    assert chosen == precision
    sizes = {"batch_size": BATCH_SIZE, "num_processes": num_processes()}
    fits, is_too_many = (
        paces[precision].training_s(n, **sizes) for n in (num_steps, num_steps + 1)
    )
    assert fits <= TRAINING_S < is_too_many


def test_a_fast_cpu_takes_no_more_steps_than_the_demo_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    pace = Pace(step_s=1e-3, encode_s=1e-4)
    monkeypatch.setattr("demo.pace.measure_pace", lambda batch_size, num_processes: {"32": pace})
    assert choose_training() == ("32", NUM_STEPS)
