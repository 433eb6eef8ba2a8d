"""What a failed run says, once: the system's refusals in a line, our faults with a traceback."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lightning_faults
from inpainting.finite import NotFiniteError
from lightning_faults import SYSTEM_ERRNOS, EndTogether, explain, is_lost_process

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
