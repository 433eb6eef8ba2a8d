"""What a failed run says, once: the system's refusals in a line, our faults with a traceback."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_faults
import train_lightning
from inpainting.finite import NotFiniteError
from lightning_faults import (
    SYSTEM_ERRNOS,
    EndTogether,
    OtherStartError,
    StartTogether,
    explain,
    is_lost_process,
    leave_lost_workers_to_the_loader,
)

GLOO = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:29500"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
         r"^No space left on device: /runs/1: make room there$"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "/runs/1/x.ckpt"), r": /runs/1/x\.ckpt: "),
        (torch.OutOfMemoryError("CUDA out of memory"), r"^out of GPU memory\. Try --gradient_"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \n"),
         r"a loader process died.*\(pid 7\) is killed by signal: Killed\.\): lower --num_workers$"),
        (RuntimeError(GLOO), r"^another process of this run is gone$"),
        (torch.distributed.DistNetworkError("Connection reset by peer"), r"^another process"),
        (NotFiniteError("5 steps; pictures: 3"), r"^5 steps; pictures: 3\. The last checkpoint"),
    ],
)  # fmt: skip
def test_what_is_no_fault_of_ours_is_said_in_a_line(error, message) -> None:
    said = explain(error, run_dir=Path("/runs/1"))
    assert said is not None
    assert re.search(message, said), said
    assert "\n" not in said


@pytest.mark.parametrize("number", SYSTEM_ERRNOS)
def test_each_refusal_of_the_system_says_what_to_do(number) -> None:
    assert explain(OSError(number, "refused"), run_dir=Path()) is not None


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "gone"),
     ValueError("Connection closed by peer"),
     KeyError("Caught KeyError in DataLoader worker process 0.")],
)  # fmt: skip
def test_a_fault_of_ours_is_not_explained_away(error) -> None:
    assert explain(error, run_dir=Path()) is None
    assert not is_lost_process(error)


class _RaisesInAFinalizer:
    """What its finalizer raises can go nowhere: Python prints it."""

    def __init__(self, fault: Callable[[], object]) -> None:
        self.fault = fault

    def __del__(self) -> None:
        self.fault()


def test_a_loader_process_that_dies_while_a_finalizer_runs_is_told_once_and_by_the_loader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: printed.append(dropped.exc_type))
    leave_lost_workers_to_the_loader()
    batches = iter(DataLoader(range(100), num_workers=1))  # type: ignore[arg-type]
    (worker,) = batches._workers  # type: ignore[attr-defined]

    def kill() -> None:
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(10)  # until the signal of its end, whose handler raises

    before = time.monotonic()
    _RaisesInAFinalizer(kill)
    assert time.monotonic() - before < 10, "nothing was raised in the finalizer"
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        list(batches)
    assert explain(caught.value, run_dir=Path()) is not None
    assert not printed
    _RaisesInAFinalizer(lambda: 1 / 0)
    assert printed == [ZeroDivisionError]


def test_a_training_leaves_lost_workers_to_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(
        lightning_faults, "leave_lost_workers_to_the_loader", lambda: done.append("left")
    )
    monkeypatch.setattr(train_lightning, "_find_lr", lambda run: done.append("began"))
    train_lightning.train(SimpleNamespace(args=SimpleNamespace(find_lr=True)))  # type: ignore[arg-type]
    assert done == ["left", "began"]


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        ("exit 1", 1, None),
        ("exit 2", 2, None),
        ("kill -KILL $$", 1, "process .* of this run was killed by SIGKILL"),
    ],
)
def test_another_process_is_explained_only_where_it_could_not_speak(
    end: str,
    code: int,
    line: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(lightning_faults.os, "_exit", leave)
    monkeypatch.setenv("INPAINTING_FIRST_PROCESS", "0")
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=None))
    with pytest.raises(SystemExit) as caught:
        EndTogether()._wait_for(trainer, subprocess.Popen(["sh", "-c", end]))  # type: ignore[arg-type]
    assert caught.value.code == code
    assert len(caplog.messages) == (line is not None)
    assert line is None or re.search(line, caplog.messages[0])


@pytest.mark.parametrize("name", ["data", "checkpoint"])
def test_a_process_that_starts_from_something_else_is_refused(name) -> None:
    start = {"data": "0123", "checkpoint": "run/checkpoints/last.ckpt"}
    firsts = start | {name: "another"}
    strategy = SimpleNamespace(broadcast=lambda _: firsts)
    trainer: Any = SimpleNamespace(strategy=strategy, global_rank=3)
    module: Any = None
    with pytest.raises(OtherStartError, match=f"the same {name}, got .* in process 3 and another"):
        StartTogether(start).setup(trainer, module, "fit")
    StartTogether(firsts).setup(trainer, module, "fit")


def test_lightnings_own_processes_take_the_first_ones_checkpoint(tmp_path, monkeypatch) -> None:
    """Another run may have saved since: it is the newest one then."""
    args = argparse.Namespace(resume_from_checkpoint="last", output_dir=str(tmp_path))
    paths = [tmp_path / "first.ckpt", tmp_path / "newer.ckpt"]
    monkeypatch.setattr(train_lightning, "find_checkpoint", lambda *_, **__: paths[0])
    monkeypatch.delenv(train_lightning.CHECKPOINT_VARIABLE, raising=False)
    monkeypatch.setenv(train_lightning.CHECKPOINT_VARIABLE, "that of an earlier start")
    assert train_lightning._find_checkpoint(args) == paths[0]
    paths.pop(0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train_lightning._find_checkpoint(args) == tmp_path / "first.ckpt"
    monkeypatch.delenv(train_lightning.CHECKPOINT_VARIABLE)  # torchrun's processes inherit nothing
    assert train_lightning._find_checkpoint(args) == tmp_path / "newer.ckpt"
