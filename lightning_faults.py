"""How a run fails: what happened in one line, and no process of it left waiting for another one."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from inpainting.finite import NotFiniteError
from inpainting.runs import STOP_SIGNALS

logger = logging.getLogger("train_lightning")

# How long a process that lost another one leaves that one to say why, and end.
PATIENCE_S = 5.0
# What the system refuses, whatever was asked of it: no fault of ours.
SYSTEM_ERRNOS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.EIO: "look after the disk",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENOMEM: "lower --num_workers",
}
_FIRST = "INPAINTING_FIRST_PROCESS"
_LOST = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|[Ss]ocket closed")


def explain(error: BaseException, *, run_dir: Path) -> str | None:
    """Return what happened and what to do about it; None for a fault of ours."""
    if isinstance(error, NotFiniteError):
        return (
            f"{error}. The last checkpoint holds the weights before them: lower --learning_rate, "
            "or look at those pictures"
        )
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "out of GPU memory. Try --gradient_checkpointing, --use_8bit_adam, a smaller "
            "--batch_size with --accumulate_grad_batches, or --precision bf16-mixed"
        )
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRNOS:
        place = error.filename or run_dir
        return f"{error.strerror}: {place}: {SYSTEM_ERRNOS[error.errno]}"
    if is_lost_worker(error):
        reason = " ".join(str(error).split())
        return f"a loader process died, perhaps for want of memory ({reason}): lower --num_workers"
    if is_lost_process(error):
        return "another process of this run is gone"
    return None


def is_lost_worker(error: BaseException | None) -> bool:
    """Whether this is what torch raises when a loader process ended, not what one raised."""
    return "DataLoader worker (pid" in str(error)


def leave_lost_workers_to_the_loader() -> None:
    """Let finalizers not tell of a loader process's end: the loader asks every 5 s who lives.

    torch raises it from a signal's handler too, wherever the main thread is: Python can't let it
    out of a finalizer, and prints it there with its traceback.
    """
    hook = sys.unraisablehook

    def say(dropped: sys.UnraisableHookArgs) -> None:
        if not is_lost_worker(dropped.exc_value):
            hook(dropped)

    sys.unraisablehook = say


def end_workers() -> None:
    """Kill the loader processes that are left: at its end Python would wait for them for ever.

    It asks them by SIGTERM, which they leave to the run. Lightning has ended them by now, but not
    those of training where a run stops or fails within a validation.
    """
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for worker in workers:
        worker.kill()


def is_lost_process(error: BaseException) -> bool:
    """Whether this is what a collective raises when another process ended."""
    is_collective = isinstance(error, dist.DistError) or type(error) is RuntimeError
    return is_collective and dist.is_available() and bool(_LOST.search(str(error)))


class OtherStartError(ValueError):
    """A process of the run would start from something else than the first one."""


class StartTogether(pl.Callback):
    """Refuses processes that start from different things: each one reads the files by itself.

    Another run may have saved in between, and a machine's copy of the pictures may lack one: the
    processes would train apart, or wait for each other for ever.

    Args:
        start: what the run starts from, by its names.
    """

    def __init__(self, start: Mapping[str, Any]) -> None:
        self.start = dict(start)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare with the first process.

        Raises:
            OtherStartError: names what differs.
        """
        expected = trainer.strategy.broadcast(self.start)
        for name, value in self.start.items():
            if value != expected[name]:
                raise OtherStartError(
                    f"all processes of a run must start from the same {name}, got {value} in "
                    f"process {trainer.global_rank} and {expected[name]} in the first one. Let all "
                    "machines read the same files, and name the checkpoint itself."
                )


class EndTogether(pl.Callback):
    """Notices within seconds that another process of the run ended, whatever this one waits for.

    Lightning's own observer kills the first process without a word when another one fails, and
    none of the others notices that the first one was killed: on GPUs they wait for ever.
    torchrun does both by itself.
    """

    def __init__(self) -> None:
        self.is_ending = False
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.environ[_FIRST] = str(os.getpid())  # what this process starts inherits it

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin to watch: the first process the others, those the first."""
        for thread in threading.enumerate():
            if thread.name == "child-process-observer":
                thread._child_processes = []  # type: ignore[attr-defined]
        for process in processes_of(trainer):
            threading.Thread(target=self._wait_for, args=(trainer, process), daemon=True).start()
        first = int(os.environ.get(_FIRST, os.getpid()))
        if first != os.getpid():
            threading.Thread(target=_end_with, args=(first,), daemon=True).start()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the word to this process where it knows why it fails."""
        self.is_ending = not is_lost_process(exception)

    def _wait_for(self, trainer: pl.Trainer, process: subprocess.Popen) -> None:
        with suppress(ChildProcessError):  # Lightning's observer may take its code first
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        code = process.poll()
        if not code:
            return
        if code in [128 + signum for signum in STOP_SIGNALS]:  # it was told to end at once
            os._exit(code)
        if self.is_ending:
            time.sleep(2 * PATIENCE_S)  # it ends by itself, or hangs
        elif code < 0:  # otherwise it has said why
            print(flush=True)  # the bar's line ends here
            logger.error(
                "error: process %d of this run was killed by %s. To go on: "
                "--resume_from_checkpoint last", process.pid, signal.Signals(-code).name,
            )  # fmt: skip
        end_others(trainer)
        os._exit(max(code, 1))


def _end_with(parent: int) -> None:
    """End this process when the first one is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    logger.error(
        "error: the first process of this run is gone. To go on: --resume_from_checkpoint last"
    )
    os._exit(1)


def processes_of(trainer: pl.Trainer) -> list[subprocess.Popen]:
    """Return the processes that this one started; none on all but the first."""
    launcher = trainer.strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def end_others(trainer: pl.Trainer) -> None:
    """Kill the run's other processes: a signal that asks them to save would have them wait."""
    for process in processes_of(trainer):
        process.kill()
