"""How state gets to disk: whole or not at all, and last.ckpt at the right moments."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

from inpainting.atomic import replace_atomically, write_text_atomically
from inpainting.preflight import MONITORS
from inpainting.runs import STOP_SIGNALS, lock_run_dir
from lightning_checkpoints import (
    AtomicCheckpointIO,
    KeepRunFolder,
    LastCheckpoint,
    NamedCheckpoint,
    StopAtMaxSteps,
    StopOnSignal,
    StoppedBySignal,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- whole or not at all


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with replace_atomically(path) as temporary:
            temporary.write_text("half of the ne")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replace_atomically(path) as temporary:
        assert temporary.parent == path.parent, "a rename must not cross filesystems"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    synced: list[tuple[bool, str]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").is_dir(), path.read_text()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write_text_atomically(path, "new")
    assert synced == [(False, "old"), (True, "new")], "first the file, then its folder's entry"


def test_a_checkpoint_that_cant_be_written_leaves_the_old_one(tmp_path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": torch.tensor(1)}, path)
    with pytest.raises(Exception, match="pickle"):
        io.save_checkpoint({"big": torch.zeros(10_000), "step": lambda: 2}, path)
    assert torch.load(path, weights_only=True) == {"step": torch.tensor(1)}
    assert names_in(path.parent) == ["last.ckpt"]


# ---- when


class Line(pl.LightningModule):
    """The smallest module that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return (self.weight - batch.mean()).square().mean()

    def validation_step(self, batch, batch_idx) -> None:
        pass

    def on_train_epoch_end(self) -> None:
        for name in MONITORS:
            self.log(name, torch.tensor(1.0 / (1 + self.current_epoch)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SavedSteps(AtomicCheckpointIO):
    """Remembers at which steps each file was written."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.steps.append((Path(path).name, checkpoint["global_step"]))

    def of(self, name: str) -> list[int]:
        return [step for saved, step in self.steps if saved == name]


class SignalInValidation(pl.Callback):
    """Sends this process a signal within a validation batch, after the sanity check."""

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if not trainer.sanity_checking and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_start(self, trainer, pl_module) -> None:
        self.num_validated = 0

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.num_validated += 1


class SignalAt(pl.Callback):
    """Sends this process a signal within a step."""

    def __init__(self, step: int, signum: int) -> None:
        self.step, self.signum = step, signum

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)


@pytest.fixture
def restored_signals():
    handlers = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


pytestmark = pytest.mark.usefixtures("restored_signals")


def fit(
    folder: Path,
    *,
    num_batches: int = 6,
    num_epochs: int = 2,
    every_n_steps: int = 4,
    accumulate: int = 1,
    max_steps: int = -1,
    num_val_batches: int = 0,
    extra: tuple[pl.Callback, ...] = (),
    named: NamedCheckpoint | None = None,
) -> SavedSteps:
    io, stop = SavedSteps(), StopOnSignal()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=num_epochs,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        plugins=[io],
        callbacks=[
            *extra,
            stop,
            StopAtMaxSteps(),
            *([named] if named else []),
            LastCheckpoint(folder / "checkpoints", every_n_steps=every_n_steps, stop=stop),
        ],
    )
    fit.io = io  # type: ignore[attr-defined]
    loaders = [
        torch.utils.data.DataLoader(torch.arange(float(count)))
        for count in (num_batches, num_val_batches)
        if count
    ]
    trainer.fit(Line(), *loaders)
    return io


def test_last_is_saved_at_the_start_every_n_steps_and_at_each_epochs_end(tmp_path) -> None:
    assert fit(tmp_path).of("last.ckpt") == [0, 4, 6, 8, 12]


def test_last_is_saved_at_whole_optimizer_steps_only(tmp_path) -> None:
    io = fit(tmp_path, accumulate=2, num_batches=8, every_n_steps=1, num_epochs=1)
    assert io.of("last.ckpt") == [0, 1, 2, 3, 4]


def test_last_is_saved_where_max_steps_cuts_an_epoch(tmp_path) -> None:
    io = fit(tmp_path, max_steps=3, every_n_steps=100)
    assert io.of("last.ckpt")[:2] == [0, 3]
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert (checkpoint["global_step"], checkpoint["epoch"]) == (3, 0)


@pytest.mark.parametrize(
    ("accumulate", "num_batches", "steps"), [(1, 6, [0, 5, 6]), (2, 7, [0, 3, 4]), (2, 2, [0, 1])]
)
def test_the_step_before_a_validation_is_saved_too(
    tmp_path, accumulate, num_batches, steps
) -> None:
    io = fit(
        tmp_path, accumulate=accumulate, num_batches=num_batches, num_val_batches=2, num_epochs=1,
        every_n_steps=100,
    )  # fmt: skip
    assert io.of("last.ckpt") == steps


def test_a_signal_within_a_validation_stops_before_its_end(tmp_path) -> None:
    in_validation = SignalInValidation()
    with pytest.raises(StoppedBySignal) as stopped:
        fit(tmp_path, every_n_steps=100, num_val_batches=4, extra=(in_validation,))
    assert (stopped.value.signum, stopped.value.step) == (signal.SIGTERM, 5)
    assert fit.io.of("last.ckpt") == [0, 5]  # type: ignore[attr-defined]
    assert in_validation.num_validated == 2


def test_the_validation_that_max_steps_leads_to_is_not_stopped(tmp_path) -> None:
    """A resume would find no step to take, and end without it."""
    in_validation = SignalInValidation()
    fit(tmp_path, max_steps=3, every_n_steps=100, num_val_batches=4, extra=(in_validation,))
    assert in_validation.num_validated == 4


@pytest.mark.parametrize(
    ("first", "second", "seconds", "ends"),
    [
        ("SIGINT", "SIGINT", 0, True),
        ("SIGTERM", "SIGTERM", 0, False),
        ("SIGTERM", "SIGTERM", 6, True),
        ("SIGUSR1", "SIGTERM", 0, False),
        ("SIGUSR1", "SIGTERM", 120, True),
        ("SIGINT", "SIGTERM", 0, False),
    ],
)
def test_a_signal_that_comes_twice_is_one_unless_somebody_waited(
    first, second, seconds, ends, monkeypatch
) -> None:
    now, codes = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", codes.append)
    stop = StopOnSignal()
    stop._handle(signal.Signals[first], None)
    now[0] += seconds
    stop._handle(signal.Signals[second], None)
    assert codes == ([128 + signal.Signals[second]] if ends else [])
    assert stop._own == signal.Signals[first]


def test_what_another_rank_got_does_not_make_the_own_signal_a_second_one(monkeypatch) -> None:
    """The ranks' signals arrive one after the other: this one was in the midst of saving."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(dist, "all_reduce", lambda flag, **_: flag.fill_(signal.SIGTERM))
    stop = StopOnSignal()
    stop._group = object()  # type: ignore[assignment]
    assert stop.is_requested(pl.Trainer(logger=False))
    assert stop.signum == signal.SIGTERM
    stop._handle(signal.SIGTERM, None)
    assert not codes


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_a_signal_ends_the_step_saves_and_stops(tmp_path, signum) -> None:
    with pytest.raises(StoppedBySignal) as stopped:
        fit(tmp_path, every_n_steps=100, extra=(SignalAt(2, signum),))
    assert stopped.value.signum == signum
    assert fit.io.of("last.ckpt") == [0, 3]  # type: ignore[attr-defined]


def test_a_signal_in_an_epochs_last_step_saves_the_whole_epoch(tmp_path) -> None:
    with pytest.raises(StoppedBySignal):
        fit(tmp_path, every_n_steps=100, extra=(SignalAt(5, signal.SIGTERM),))
    assert fit.io.of("last.ckpt") == [0, 6]  # type: ignore[attr-defined]


def test_a_crash_leaves_the_last_saved_step(tmp_path) -> None:
    class Crash(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 5:
                raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, every_n_steps=2, extra=(Crash(),))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4


@pytest.mark.parametrize(
    ("num_epochs", "interval", "epochs"), [(7, 3, [0, 2, 5, 6]), (4, 1, [0, 1, 2, 3]), (1, 5, [0])]
)
def test_named_checkpoints_come_every_n_epochs_and_at_the_first_and_last(
    tmp_path, num_epochs, interval, epochs
) -> None:
    named = NamedCheckpoint(
        tmp_path / "checkpoints", every_n_epochs=interval, save_top_k=-1, monitor="train_loss"
    )
    fit(tmp_path, num_epochs=num_epochs, num_batches=2, named=named)
    names = sorted(p.name for p in (tmp_path / "checkpoints").glob("controlnet-*.ckpt"))
    assert names == [
        f"controlnet-epoch={epoch:02d}-train_loss={1 / (1 + epoch):.4f}.ckpt" for epoch in epochs
    ]


@pytest.mark.parametrize(
    ("monitor", "best"),
    [("train_loss", "34"), ("val/loss", "34"), ("val/loss_hole", "34"),
     ("val/control_gain", "01"), ("val/psnr_hole", "01")],
)  # fmt: skip
def test_the_best_named_checkpoints_are_kept(tmp_path, monitor, best) -> None:
    """Every metric falls here: good for a loss, bad for the gain and the PSNR."""
    named = NamedCheckpoint(
        tmp_path / "checkpoints", every_n_epochs=1, save_top_k=2, monitor=monitor
    )
    fit(tmp_path, num_epochs=5, num_batches=2, named=named)
    names = sorted(p.name[:19] for p in (tmp_path / "checkpoints").glob("controlnet-*.ckpt"))
    assert names == [f"controlnet-epoch=0{epoch}" for epoch in best]
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_a_lower_save_top_k_cuts_the_ranking_and_deletes_nothing(tmp_path) -> None:
    def named(save_top_k: int) -> NamedCheckpoint:
        return NamedCheckpoint(
            tmp_path / "checkpoints", every_n_epochs=1, save_top_k=save_top_k, monitor="val/loss"
        )

    first = named(3)
    fit(tmp_path, num_epochs=3, num_batches=2, named=first)
    kept = set((tmp_path / "checkpoints").glob("controlnet-*.ckpt"))
    resumed = named(1)
    resumed.load_state_dict(first.state_dict())
    [best] = resumed.best_k_models
    assert best == first.best_model_path == resumed.kth_best_model_path
    assert resumed.kth_value == first.best_model_score
    assert set((tmp_path / "checkpoints").glob("controlnet-*.ckpt")) == kept
    raised = named(5)
    raised.load_state_dict(first.state_dict())
    assert raised.best_k_models == first.best_k_models


def test_a_checkpoint_says_of_which_run_it_is_and_a_deleted_folder_is_made_again(tmp_path) -> None:
    run_dir = tmp_path / "run"
    keeper = KeepRunFolder(run_dir, run_json="{}", run_state={"flags": {"seed": 1}})
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "run.json").write_text("as it was")

    class Delete(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 1:
                assert (run_dir / "run.json").read_text() == "as it was"
                shutil.rmtree(run_dir)

    fit(run_dir, every_n_steps=2, num_epochs=1, extra=(keeper, Delete()))
    assert (run_dir / "run.json").read_text() == "{}"
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["run"] == {"flags": {"seed": 1}}
    with pytest.raises(BlockingIOError):
        lock_run_dir(run_dir)


def test_lightning_asks_no_rank_for_a_signal_before_each_batch(tmp_path, monkeypatch) -> None:
    name = "_broadcast_sigterm_tensor"
    assert name in _TrainingEpochLoop.advance.__code__.co_names, "it would prove nothing"
    asked: list[int] = []
    monkeypatch.setattr(_TrainingEpochLoop, name, lambda _: asked.append(1))

    class Ask(pl.Callback):  # as advance does with several ranks
        def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()

    fit(tmp_path, extra=(Ask(),))
    assert not asked
