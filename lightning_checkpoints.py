"""How a run's state gets to disk and how a run stops: nothing that was saved is ever lost."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DeepSpeedStrategy

from inpainting.atomic import replace_atomically, write_text_atomically
from inpainting.preflight import MONITORS
from inpainting.runs import STOP_SIGNALS, lock_run_dir

logger = logging.getLogger("train_lightning")

LAST_NAME = "last.ckpt"


class StoppedBySignal(Exception):
    """Raised on every rank where a run stops, to go on from what is saved.

    Attributes:
        signum: one of STOP_SIGNALS.
        step: the optimizer step that was saved.
    """

    def __init__(self, signum: int, *, step: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.step = signum, step


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames: a kill leaves the old file or the new one.

    Lightning stages in $TMPDIR and moves, which is a copy where that is another filesystem.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write one checkpoint file.

        Through a file of Python's, whose error is raised: torch.save's own hides why it failed.
        """
        with replace_atomically(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


class KeepRunFolder(pl.Callback):
    """Puts into each checkpoint what run it is of, and makes a deleted run folder again.

    Args:
        run_dir: the run's folder.
        run_json: the text of its run.json.
        run_state: `inpainting.changes.run_state`, for the next start to compare with.
    """

    def __init__(self, run_dir: Path, *, run_json: str, run_state: dict[str, Any]) -> None:
        self.run_dir = run_dir
        self.run_json = run_json
        self.run_state = run_state

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the run's state; without run.json the folder would be no run's any more."""
        checkpoint["run"] = self.run_state
        path = self.run_dir / "run.json"
        if trainer.is_global_zero and not path.exists():
            logger.warning("warning: %s was deleted: made again, to save into", self.run_dir)
            write_text_atomically(path, self.run_json)
            lock_run_dir(self.run_dir)


class NamedCheckpoint(ModelCheckpoint):
    """`controlnet-epoch=00-train_loss=0.1234.ckpt`: every N epochs, the first and the last one.

    In an epoch that max_steps cuts short it is written behind the validation, by when Lightning
    counts the epoch as done and would resume with the next one: it holds the loops as they stood
    after the last step.

    Args:
        dirpath: the run's checkpoints folder.
        every_n_epochs: between two of them.
        save_top_k: how many of the best are kept; -1 keeps all.
        monitor: the metric that ranks them, a key of MONITORS.
    """

    def __init__(
        self, dirpath: Path, *, every_n_epochs: int, save_top_k: int, monitor: str
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="controlnet-{epoch:02d}-{train_loss:.4f}",
            monitor=monitor,
            mode=MONITORS[monitor],
            save_top_k=save_top_k,
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.interval = every_n_epochs
        self._loops_at_cut: dict[str, Any] | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the ranking, cut to save_top_k: what drops out of it stays on the disk."""
        super().load_state_dict(state_dict)
        if 0 < self.save_top_k < len(self.best_k_models):
            ranked = sorted(
                self.best_k_models, key=lambda path: float(self.best_k_models[path]),
                reverse=self.mode == "max",
            )  # fmt: skip
            self.best_k_models = {
                path: self.best_k_models[path] for path in ranked[: self.save_top_k]
            }
            self.kth_best_model_path = ranked[self.save_top_k - 1]
            self.kth_value = self.best_k_models[self.kth_best_model_path]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        """Keep the loops' state where max_steps cuts the epoch."""
        is_cut = not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if is_cut and trainer.global_step == trainer.max_steps:
            self._loops_at_cut = trainer.fit_loop.state_dict()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put back the loops' state of a cut epoch."""
        if self._loops_at_cut is not None:
            checkpoint["loops"]["fit_loop"] = self._loops_at_cut

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where one is due; all metrics of this epoch are known by now."""
        epoch = trainer.current_epoch
        is_last = epoch + 1 == trainer.max_epochs or trainer.should_stop
        if epoch == 0 or is_last or (epoch + 1) % self.interval == 0:
            super().on_train_epoch_end(trainer, pl_module)


class LastCheckpoint(Checkpoint):
    """`last.ckpt`: the newest state, at optimizer-step boundaries only.

    Written before the first step, every N steps, when the run stops, and at each epoch's end
    after all other bookkeeping (Lightning runs Checkpoint callbacks last, in their order).
    ModelCheckpoint's own save_last follows its top-k files and is stale in between.

    Not at an epoch's last batch: Lightning would resume behind the validation that is still due.
    The save at the epoch's end follows it, and the step before the last one is saved instead: who
    is stopped or killed within a validation takes that last step again, and validates.

    Args:
        dirpath: the run's checkpoints folder.
        every_n_steps: optimizer steps between two saves.
        stop: tells when a signal asks to stop; the state is saved first.
    """

    def __init__(self, dirpath: Path, *, every_n_steps: int, stop: StopOnSignal) -> None:
        self.path = dirpath / LAST_NAME
        self.every_n_steps = every_n_steps
        self.stop = stop
        self._saved_step = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save before the first step: whatever happens, there is something to resume from."""
        if trainer.is_global_zero:  # what a kill within a save left behind
            for torn in self.path.parent.glob(".*.ckpt.*.tmp"):
                torn.unlink()
        if trainer.global_step == 0:
            self._save(trainer)
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
    ) -> None:
        """Save where one is due, and stop where a signal asked for it."""
        step = trainer.global_step
        is_boundary = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if step == self._saved_step or is_boundary or not self._has_stepped(trainer):
            return
        stops = self.stop.is_requested(trainer)
        is_due = step % self.every_n_steps == 0 or step == trainer.max_steps
        if stops or is_due or self._precedes_validation(trainer):
            self._save(trainer)
        if stops:
            raise StoppedBySignal(self.stop.signum, step=self._saved_step)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
    ) -> None:
        """Stop where a signal asked for it: who sent it may not wait until all are validated.

        Not where max_steps cut the epoch: a resume would have no step left, and not validate.
        """
        will_be_validated = trainer.global_step != self._saved_step
        if not trainer.sanity_checking and will_be_validated and self.stop.is_requested(trainer):
            raise StoppedBySignal(self.stop.signum, step=self._saved_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save a completed epoch; one that max_steps cut short was saved at its last step."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)
            if self.stop.is_requested(trainer):
                raise StoppedBySignal(self.stop.signum, step=self._saved_step)

    @staticmethod
    def _precedes_validation(trainer: pl.Trainer) -> bool:
        """Whether one more optimizer step ends the epoch, and a validation follows it."""
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        is_next_last = trainer.num_training_batches - ready <= trainer.accumulate_grad_batches
        return is_next_last and sum(trainer.num_val_batches) > 0

    @staticmethod
    def _has_stepped(trainer: pl.Trainer) -> bool:
        """Whether this micro-batch ended an accumulation."""
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return ready % trainer.accumulate_grad_batches == 0

    def _save(self, trainer: pl.Trainer) -> None:
        """Write last.ckpt. Every rank takes part.

        DeepSpeed writes a folder of many files: there are two in turn, and last.ckpt is a link
        that moves to the new one once it is whole. `*.ckpt` finds the link alone.
        """
        self._saved_step = trainer.global_step
        if not isinstance(trainer.strategy, DeepSpeedStrategy):
            trainer.save_checkpoint(self.path)
            return
        folder, old = (self.path.with_name(f"last.{letter}") for letter in "ab")
        if self.path.is_symlink() and self.path.readlink().name == folder.name:
            folder, old = old, folder
        if trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)
        trainer.save_checkpoint(folder)  # rank 0's path counts, on all ranks
        if trainer.is_global_zero:
            link = self.path.with_name(f".{LAST_NAME}.link")
            link.unlink(missing_ok=True)
            link.symlink_to(folder.name)
            link.replace(self.path)
            shutil.rmtree(old, ignore_errors=True)
        trainer.strategy.barrier()  # no rank may end before the link is there


class StopOnSignal(pl.Callback):
    """Turns a signal into a stop at the next step's end, on all ranks alike.

    Lightning's own SIGTERM handler talks to the other ranks from within the handler, and hangs
    where all of them got the signal.

    A second Ctrl-C ends the process at once, and so does any signal SECOND_AFTER_S after the first.
    Sooner it is the same one again: a scheduler signals all processes of a job, and torchrun its
    own ones once more.

    Attributes:
        signum: what the run was asked to stop by, whichever rank got it; 0: it wasn't.
    """

    SECOND_AFTER_S = 5.0

    def __init__(self) -> None:
        self.signum = 0
        self._own: int | None = None
        self._own_time = 0.0
        self._group: dist.ProcessGroup | None = None

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers; replaces Lightning's, and the command's ending at once."""
        signal.set_wakeup_fd(-1)
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._handle)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prepare for asking all ranks; install the handlers where no sanity check did."""
        self.on_sanity_check_start(trainer, pl_module)
        # Lightning asks all ranks before each batch, and its answer waits for the GPU.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if trainer.world_size > 1:
            # On the CPU: asking costs no synchronisation with the GPU.
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))

    def is_requested(self, trainer: pl.Trainer) -> bool:
        """Whether any rank got a signal. Every rank must ask."""
        self.signum = self._own or 0
        if self._group is not None:
            flag = torch.tensor(self.signum)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            self.signum = int(flag)
        return self.signum != 0

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._own is None:
            self._own, self._own_time = signum, time.monotonic()
            os.write(2, b"\nstopping after this step; Ctrl-C again ends at once\n")
            return
        is_second_ctrl_c = self._own == signum == signal.SIGINT
        if is_second_ctrl_c or time.monotonic() - self._own_time >= self.SECOND_AFTER_S:
            os._exit(128 + signum)


class StopAtMaxSteps(pl.Callback):
    """Ends a run that max_steps cuts short within an epoch with a validation, like any other."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
    ) -> None:
        """Ask Lightning to stop; it validates first."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
