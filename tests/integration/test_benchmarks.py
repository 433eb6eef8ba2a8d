"""The benchmarks run at their smallest size, and fail where they should. No time is asserted."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import data
from benchmarks import data as data_benchmark
from benchmarks import memory, overhead, step
from benchmarks.timing import Spread, ratios, take_turns
from inpainting.latents import MomentsCache
from lightning_module import InpaintingControlNet
from model import Base

TINY = ["--size", "tiny", "--num_rounds", "2", "--num_steps", "2"]


def rows_of(table: str) -> dict[str, list[str]]:
    """Return each row's cells by its name."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines[1:]}


def test_all_rows_train_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(TINY) == 0
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == [step.REFERENCE, *step.ROWS]
    differences = {name: float(cells[-1]) for name, cells in rows.items()}
    assert differences[step.AGAIN] == 0, "the same code on the same data"
    assert 0 < differences["project, cached"] <= 1e-5, "rounded to float16"


def test_all_rows_train_alike_in_bf16() -> None:
    assert step.main([*TINY, "--precision", "bf16-mixed"]) == 0


@pytest.mark.parametrize("row", ["project, nothing cached", "project, cached"])
def test_a_step_that_computes_something_else_is_refused(
    row: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = InpaintingControlNet.loss

    def wrong_loss(self, batch, controlnet) -> torch.Tensor:
        return loss(self, batch, controlnet) * (1 + 1e-4)

    monkeypatch.setattr(InpaintingControlNet, "loss", wrong_loss)
    assert step.main([*TINY, "--rows", row]) == 1
    out, err = capsys.readouterr()
    assert "PARTED" in rows_of(out)[row][-1]
    assert err.startswith("error: ")


def test_a_cached_step_never_asks_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    args = step.build_parser().parse_args(["--size", "tiny", "--image_size", "64"])
    args.rows = ["project, nothing cached", "project, cached"]
    rows = step.build_rows(args)
    calls = []
    encode_image = Base.encode_image
    monkeypatch.setattr(
        Base, "encode_image", lambda self, image: calls.append(1) or encode_image(self, image)
    )  # fmt: skip
    for _ in range(step.NUM_BATCHES):
        rows["project, cached"].step()
    assert not calls
    rows["project, nothing cached"].step()
    assert calls == [1]


def measure_memory(
    capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, dict[str, list[str]]]:
    code = memory.main(["--size", "tiny", *flags])
    return code, rows_of(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("precision", "saved_mib", "shares"),
    [("32", 2.7, [1.0, 0.915, 0.818]), ("bf16-mixed", 2.3, [1.0, 0.894, 0.836])],
)
def test_checkpointing_saves_so_much_and_changes_nothing(
    precision: str, saved_mib: float, shares: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """At this size most of the bytes are the hint encoder's, which are kept either way."""
    code, rows = measure_memory(capsys, "--precision", precision)
    assert code == 0
    found = [rows[setting] for setting in memory.SETTINGS]
    assert float(found[0][0]) == pytest.approx(saved_mib, rel=0.02)
    assert [float(cells[1]) for cells in found] == pytest.approx(shares, abs=0.01)
    assert [cells[3] for cells in found] == ["0.0e+00"] * 3, "the same bits"
    assert float(rows["optimizer"][0]) == pytest.approx(2 * float(rows["ControlNet"][0]), abs=0.2)


def test_saved_bytes_grow_with_the_batch_alone(capsys: pytest.CaptureFixture[str]) -> None:
    _, one = measure_memory(capsys)
    _, three = measure_memory(capsys, "--batch_size", "3")
    for setting in memory.SETTINGS:
        assert float(three[setting][0]) == pytest.approx(3 * float(one[setting][0]), rel=0.02)
    assert one["together"] == three["together"]


def test_what_is_saved_is_counted_once_and_without_parameters() -> None:
    layer = torch.nn.Linear(4, 4)
    x = torch.ones(8, 4, requires_grad=True)
    with memory.count_saved([layer]) as saved:
        y = layer(x)
        (y * y).sum()  # y twice, x, the weight
    assert sum(storage.nbytes() for storage in saved.values()) == 2 * 8 * 4 * 4


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_shapes_alone_tell_what_is_saved(
    precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, computed = measure_memory(capsys, "--precision", precision)
    code, counted = measure_memory(capsys, "--precision", precision, "--shapes_only")
    assert code == 0
    for setting in memory.SETTINGS:
        assert counted[setting][:2] == computed[setting][:2]
        assert counted[setting][2:] == ["not measured", "not computed"]


def test_a_setting_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_project = memory.build_project

    def spoiled(*args, gradient_checkpointing: bool, **kwargs) -> step.Project:
        project = build_project(*args, gradient_checkpointing=gradient_checkpointing, **kwargs)
        if gradient_checkpointing:
            project.batches[0]["noise"] = project.batches[0]["noise"] * 1.01
        return project

    monkeypatch.setattr(memory, "build_project", spoiled)
    code, rows = measure_memory(capsys)
    assert code == 1
    assert ["PARTED" in rows[setting][-1] for setting in memory.SETTINGS] == [False, False, True]


def test_rows_take_turns_in_alternating_order() -> None:
    order: list[str] = []
    rows = {name: lambda name=name: order.append(name) for name in "abc"}
    times = take_turns(rows, num_rounds=3, device=torch.device("cpu"))
    assert "".join(order) == "cba" + "abc" + "cba" + "abc", "the first round warms up"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_spreads_and_ratios() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(2.0, 3.0, 4.0)
    assert ratios([2.0, 4.0], [1.0, 4.0]).median == 1.5
    assert str(Spread(1.0, 2.0, 3.0)) == "2.000 (1.000-3.000)"


def test_the_stages_of_a_sample_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--image_size", "64", "--num_samples", "4", "--num_scenes", "2", "--scene_size", "80"]
    assert data_benchmark.main(flags) == 0
    out = capsys.readouterr().out
    medians = {name: float(cells[0].split()[0]) for name, cells in rows_of(out).items()}
    assert medians.keys() == {*data_benchmark.STAGES.values(), data_benchmark.REST, "total"}
    # What goes to the device: picture, mask, tokens, timestep, two noises, moments, id.
    expected = 3 * 64 * 64 + 64 * 64 + 77 * 8 + 8 + 2 * 4 * 8 * 8 * 4 + 8 * 8 * 8 * 2 + 8
    assert re.search(r"([\d,]+) bytes per sample", out)[1] == f"{expected:,}"  # type: ignore[index]


def test_a_stage_within_a_stage_counts_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """_read_moments calls nothing that is timed but tag_pixels."""
    cache = MomentsCache(tmp_path, image_ids=np.array([1]), moments_shape=(8, 2, 2))
    ticks = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr(data_benchmark.time, "thread_time", lambda: next(ticks))
    with data_benchmark.timed_stages(["_read_moments", "tag_pixels"]) as stages:
        data._read_moments(cache, row=0, view=0, image=np.zeros((16, 16, 3), np.uint8))
    assert stages == {"tag_pixels": 2000.0, "_read_moments": 8000.0}


def test_the_loop_is_measured_against_a_raw_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--num_rounds", "1", "--num_steps", "4"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == [
        "Lightning with bar, curves and checkpoints", "raw", "what the first costs more"
    ]  # fmt: skip
