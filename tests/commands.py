"""Runs train_lightning.py as a user does: a process (group) of its own, with a hard time limit.

Importing torch, Lightning and diffusers takes longer than a tiny run. So all but a few commands
are forked from one process that has imported them already; what runs then is the same `main`.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT_S = 300.0
PRELOADED = [
    "diffusers", "diffusers.schedulers", "transformers", "torch.utils.tensorboard",
    "matplotlib.pyplot", "train_lightning", "lightning_trainer",
]  # fmt: skip


@dataclass(frozen=True)
class Death:
    """Kills the process (SIGKILL: nothing is cleaned up) when a function is called.

    Attributes:
        function: its dotted address, "module:name" or "module:Class.name".
        call: on which call, counted from 1.
        after: once the function has returned, not before it is entered.
        signum: another signal, sent by the process to itself; it then goes on.
    """

    function: str
    call: int = 1
    after: bool = False
    signum: int = signal.SIGKILL

    def arm(self) -> None:
        """Wrap the function."""
        module_name, path = self.function.split(":")
        owner: Any = importlib.import_module(module_name)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        function, num_calls, pid = getattr(owner, name), 0, os.getpid()

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            is_due = num_calls == self.call and os.getpid() == pid
            if is_due and not self.after:
                self._strike()
            result = function(*args, **kwargs)
            if is_due and self.after:
                self._strike()
            return result

        setattr(owner, name, wrapper)

    def _strike(self) -> None:
        if self.signum == signal.SIGKILL:
            os.killpg(0, self.signum)
        os.kill(os.getpid(), self.signum)


@dataclass(frozen=True)
class Fault(Death):
    """Lets a function fail.

    Attributes:
        error: what it raises.
    """

    error: Exception = field(default_factory=lambda: KeyError("a fault of ours"))

    def _strike(self) -> None:
        raise self.error


@dataclass
class Result:
    """How a command ended: its exit code (negative: killed by that signal), and what it wrote."""

    code: int
    output: str
    output_dir: Path

    @property
    def run_dir(self) -> Path:
        """The only run folder below --output_dir."""
        folders = sorted(self.output_dir.glob("*"))
        assert len(folders) == 1, f"one run folder was expected, got {folders}\n{self.output}"
        return folders[0]


@dataclass
class Running:
    """A command that runs."""

    process: ForkServerProcess
    log_path: Path
    output_dir: Path
    started: float = field(default_factory=time.monotonic)
    limit_s: float = LIMIT_S

    def output(self) -> str:
        """Return what it wrote so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for something that it does."""
        while not condition():
            assert self.process.is_alive(), f"ended too early:\n{self.output()}"
            assert time.monotonic() - self.started < self.limit_s, f"too slow:\n{self.output()}"
            time.sleep(0.01)

    def wait_until_paused(self) -> None:
        """Wait until it has stopped itself with SIGSTOP."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        self.wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T")

    def children(self) -> list[int]:
        """Return the process ids of what it started."""
        pid = self.process.pid
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def signal_group(self, signum: int) -> None:
        """Signal the command and all of its children, as a terminal does."""
        os.killpg(self.process.pid or 0, signum)

    def wait(self) -> Result:
        """Wait for its end; past the limit the whole group is killed."""
        self.process.join(self.limit_s)
        is_hanging = self.process.is_alive()
        with suppress(ProcessLookupError):
            self.signal_group(signal.SIGKILL)
        self.process.join(10)
        assert not is_hanging, f"hangs after {self.limit_s} s:\n{self.output()}"
        assert self.process.exitcode is not None
        return Result(self.process.exitcode, self.output(), self.output_dir)


@cache
def _fork_server() -> ForkServerContext:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start(
    flags: Sequence[object],
    *,
    output_dir: Path,
    deaths: Sequence[Death] = (),
    environment: Mapping[str, str] | None = None,
    limit_s: float = LIMIT_S,
) -> Running:
    """Start `python train_lightning.py FLAGS --output_dir OUTPUT_DIR`."""
    log_path = output_dir.parent / f"{output_dir.name}-{time.monotonic_ns()}.log"
    argv = [*map(str, flags), "--output_dir", str(output_dir)]
    arguments = (argv, log_path, tuple(deaths), dict(environment or {}))
    process = _fork_server().Process(target=_run_main, args=arguments)
    process.start()
    return Running(process, log_path, output_dir, limit_s=limit_s)


def run(
    flags: Sequence[object],
    *,
    output_dir: Path,
    deaths: Sequence[Death] = (),
    environment: Mapping[str, str] | None = None,
    limit_s: float = LIMIT_S,
) -> Result:
    """Run it to its end."""
    return start(
        flags, output_dir=output_dir, deaths=deaths, environment=environment, limit_s=limit_s
    ).wait()


def run_typed(arguments: Sequence[object], *, limit_s: float = LIMIT_S) -> tuple[int, str, str]:
    """Run `python ARGUMENTS` in a fresh interpreter; returns exit code, stdout and stderr."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, stdout, stderr


def _run_main(
    argv: list[str], log_path: Path, deaths: Sequence[Death], environment: dict[str, str]
) -> None:
    """Be the command: its own session, its own output, an interpreter's usual signal handlers."""
    os.setsid()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # Linux's own: loader workers use it
    os.chdir(ROOT)
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = ["train_lightning.py", *argv]
    import train_lightning

    for death in deaths:
        death.arm()
    sys.exit(train_lightning.main(argv))
