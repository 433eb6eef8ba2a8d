"""What `python -m demo` makes of the machine that it runs on."""

from __future__ import annotations

import pytest
import torch

from demo.__main__ import NUM_STEPS, TRAINING_S, choose_training
from demo.pace import measure_pace


def test_pace_is_measured_in_both_precisions_and_leaves_the_threads() -> None:
    num_threads = torch.get_num_threads()
    paces = measure_pace(batch_size=1)
    assert set(paces) == {"32", "bf16-mixed"}
    assert min(paces.values()) > 0
    assert torch.get_num_threads() == num_threads


@pytest.mark.parametrize(
    ("paces", "precision"),
    [({"32": 0.3, "bf16-mixed": 0.7}, "32"), ({"32": 0.9, "bf16-mixed": 0.5}, "bf16-mixed")],
)
def test_a_slow_cpu_takes_its_faster_precision_and_fewer_steps(
    paces: dict[str, float], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("demo.pace.measure_pace", lambda batch_size: paces)
    chosen, num_steps = choose_training()
    assert chosen == precision
    assert 0.6 * TRAINING_S < num_steps * paces[precision] <= TRAINING_S


def test_a_fast_cpu_takes_no_more_steps_than_the_demo_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("demo.pace.measure_pace", lambda batch_size: {"32": 1e-3})
    assert choose_training() == ("32", NUM_STEPS)
