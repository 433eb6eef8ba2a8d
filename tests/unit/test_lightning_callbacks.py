"""What the callbacks log: the PSNR of the validation's fills, and the validation's curves."""

from __future__ import annotations

import logging
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_callbacks
import lightning_module
from lightning_callbacks import Curves, FastestAttention, RunLogger, ValidationInpaintings
from lightning_module import InpaintingControlNet
from lightning_trainer import StopWithoutProgress
from tests import tiny

DARKER = {0: 10, 1: 20, 2: 40, 3: 80}  # grey levels, by picture


@pytest.fixture(scope="module")
def module() -> InpaintingControlNet:
    base = tiny.base()
    return tiny.module(base, tiny.controlnet(base))


@pytest.fixture
def fills(monkeypatch) -> list[int]:
    """Let the n-th picture be filled with what its hole hides, but DARKER; returns what was."""
    filled: list[int] = []

    def fill(module, sample) -> np.ndarray:
        image = sample["image"].permute(1, 2, 0).numpy().astype(np.int64)
        hole = sample["mask"][0].numpy()[..., None]
        difference = np.where(image >= 128, -1, 1) * DARKER[len(filled)]
        filled.append(int(sample["image_id"]))
        return (image + hole * difference).astype(np.uint8)

    monkeypatch.setattr(lightning_callbacks, "_inpaint", fill)
    return filled


def dataset(*, rows: list[int]):
    return tiny.dataset(tiny.coco_index(), tiny.rule(), rows=rows, is_training=False)


def validate(module, folder: Path, *, val_set) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=RunLogger(folder, name="", version=""),
        callbacks=[Curves(every_n_steps=1), ValidationInpaintings(val_set)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = torch.utils.data.DataLoader([tiny.batch(module.base)], batch_size=None)
    trainer.validate(module, batches, verbose=False)
    return trainer


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_psnr_is_the_mean_over_the_pictures(module, fills, tmp_path) -> None:
    trainer = validate(module, tmp_path, val_set=dataset(rows=[0, 1, 2, 3, 4]))
    expected = sum(20 * math.log10(255 / DARKER[i]) for i in range(4)) / 4
    assert float(trainer.callback_metrics["val/psnr_hole"]) == pytest.approx(expected, abs=1e-4)
    assert len(fills) == 4


def test_a_picture_that_stands_twice_is_filled_once(module, fills, tmp_path) -> None:
    val_set = dataset(rows=[0, 1, 2])
    val_set.unreadable.flags[1] = 1  # its place is taken by the next one
    trainer = validate(module, tmp_path, val_set=val_set)
    ids = val_set.index.image_ids
    assert fills == [ids[0], ids[2]]
    expected = (20 * math.log10(255 / 10) + 20 * math.log10(255 / 20)) / 2
    assert float(trainer.callback_metrics["val/psnr_hole"]) == pytest.approx(expected, abs=1e-4)


def test_each_rank_fills_its_part_and_all_know_the_whole(
    module, fills, tmp_path, monkeypatch
) -> None:
    val_set = dataset(rows=[0, 1, 2, 3])
    samples = [val_set[0, i] for i in range(4)]

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.uint8:
            return tensor
        others = [lightning_callbacks._inpaint(module, samples[i]) for i in (1, 3)]
        return torch.stack([tensor, torch.from_numpy(np.stack(others))])

    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    monkeypatch.setattr(module, "gather", gather)
    trainer = validate(module, tmp_path, val_set=val_set)
    ids = val_set.index.image_ids
    assert fills == [ids[0], ids[2], ids[1], ids[3]]
    expected = sum(20 * math.log10(255 / DARKER[i]) for i in range(4)) / 4
    assert float(trainer.callback_metrics["val/psnr_hole"]) == pytest.approx(expected, abs=1e-4)


def test_an_overflow_shows_no_picture_and_ranks_last(
    module, fills, tmp_path, monkeypatch, caplog
) -> None:
    def overflow(module, sample) -> np.ndarray:
        raise FloatingPointError("the networks overflowed.")

    monkeypatch.setattr(lightning_callbacks, "_inpaint", overflow)
    with caplog.at_level(logging.WARNING):
        trainer = validate(module, tmp_path, val_set=dataset(rows=[0]))
    assert math.isnan(float(trainer.callback_metrics["val/psnr_hole"]))
    assert caplog.text.count("no validation pictures: the networks overflowed.") == 1
    assert read_events(tmp_path).Tags()["images"] == []


def test_the_curves_show_everything_that_a_validation_found(module, fills, tmp_path) -> None:
    trainer = validate(module, tmp_path, val_set=dataset(rows=[0]))
    events = read_events(tmp_path)
    shown = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    bands = {name for name in shown if name.startswith("val/loss_t")}
    assert bands
    assert shown.keys() - bands == {
        "val/loss", "val/loss_hole", "val/loss_known", "val/loss_base", "val/control_gain",
        "val/psnr_hole",
    }  # fmt: skip
    for name, value in shown.items():
        assert value == pytest.approx(float(trainer.callback_metrics[name])), name


def test_curves_go_on_in_a_new_file_where_the_old_one_was_deleted(tmp_path) -> None:
    logger = RunLogger(tmp_path / "run", name="", version="")
    logger.log_metrics({"x": 1.0}, step=1)
    logger.save()
    shutil.rmtree(tmp_path / "run")
    logger.log_metrics({"x": 2.0}, step=2)
    logger.save()
    assert [event.step for event in read_events(tmp_path / "run").Scalars("x")] == [2]


def test_patience_is_the_flags_and_the_waiting_the_checkpoints() -> None:
    first, resumed = (StopWithoutProgress("val/loss", patience=patience) for patience in (2, 5))
    first.wait_count = 1
    resumed.load_state_dict(first.state_dict())
    assert (resumed.patience, resumed.wait_count) == (5, 1)


# ---- who computes attention


class Batches(pl.LightningDataModule):
    """As much of the data as the timing asks for, and a batch to train on."""

    batch_size = 2

    def __init__(self, module: InpaintingControlNet) -> None:
        super().__init__()
        self.train_set = dataset(rows=[0])
        self.batches = [tiny.batch(module.base)]

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self.batches, batch_size=None)


def train(folder: Path, *, resume: Path | None = None, **more: Any) -> InpaintingControlNet:
    """Train a step, save it as folder/a.ckpt; returns the module."""
    base = tiny.base()
    module = tiny.module(base, tiny.controlnet(base))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1 if resume is None else 2,
        callbacks=[FastestAttention()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )
    trainer.fit(module, datamodule=Batches(module), ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / "a.ckpt")
    return module


@pytest.fixture
def clock(monkeypatch) -> dict[str, float]:
    """Let a CPU be timed, and these be the times."""
    times = {"flash": 2.0, "cudnn": 1.0, "efficient": 3.0}
    monkeypatch.setattr(FastestAttention, "TIMED_DEVICES", ("cpu",))
    monkeypatch.setattr(lightning_callbacks, "time_backends", lambda sizes, **_: dict(times))
    return times


def test_the_fastest_attention_is_chosen_and_said(clock, tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        module = train(tmp_path)
    assert module.attention_backend == "cudnn"
    said = "attention by cudnn, the fastest: cudnn 1.00 ms, flash 2.00 ms, efficient 3.00 ms"
    assert said in caplog.messages


def test_the_chosen_attention_is_what_the_loss_is_computed_by(clock, tmp_path, monkeypatch) -> None:
    chosen = []
    monkeypatch.setattr(
        lightning_module, "prefer", lambda name: (chosen.append(name), nullcontext())[1]
    )
    train(tmp_path)
    assert chosen == ["cudnn"]


def test_a_resumed_run_keeps_its_attention_whatever_the_clock_says(clock, tmp_path) -> None:
    train(tmp_path)
    clock["cudnn"] = 4.0
    assert train(tmp_path, resume=tmp_path / "a.ckpt").attention_backend == "cudnn"
    assert train(tmp_path).attention_backend == "flash"


def test_torch_decides_where_no_backend_will_do(clock, tmp_path) -> None:
    clock.clear()
    assert train(tmp_path).attention_backend is None


def test_a_deterministic_run_is_not_decided_by_a_clock(clock, tmp_path) -> None:
    try:
        assert train(tmp_path, deterministic=True).attention_backend is None
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_cpu_is_not_timed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lightning_callbacks, "time_backends", lambda *_, **__: 1 / 0)
    assert train(tmp_path).attention_backend is None


def test_all_processes_attend_by_the_first_ones_choice(module, monkeypatch) -> None:
    monkeypatch.setattr(FastestAttention, "TIMED_DEVICES", ("cpu",))
    strategy = SimpleNamespace(broadcast=lambda mine: "efficient" if mine is None else mine)
    second: Any = SimpleNamespace(is_global_zero=False, strategy=strategy)
    FastestAttention().on_train_start(second, module)
    assert module.attention_backend == "efficient"
    module.attention_backend = None
