"""What the callbacks log and show."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_callbacks
from lightning_callbacks import Curves, ProgressBar, RunLogger, ValidationInpaintings
from lightning_module import InpaintingControlNet
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


def test_the_bar_asks_a_gpu_once_in_the_step_of_a_log_point(monkeypatch) -> None:
    monkeypatch.setattr(TQDMProgressBar, "on_train_batch_end", lambda *_: None)
    bar, asked = ProgressBar(), []
    trainer: Any = SimpleNamespace(log_every_n_steps=2, accumulate_grad_batches=2)

    class Loss:
        device = torch.device("cuda")

        def item(self) -> float:
            asked.append(trainer.global_step)
            return 1.0

    for micro_batch in range(1, 13):
        trainer.global_step = micro_batch // 2
        nobody: Any = None
        bar.on_train_batch_end(trainer, nobody, {"loss": Loss()}, nobody, micro_batch)
    assert asked == [0, 2, 4, 6]
