"""Comparing times on a machine that others use too: in turns, by medians, with a noise floor."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from inpainting.runs import git_commit


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize some values."""
        return cls(*np.percentile(values, (25, 50, 75)).tolist())

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


def take_turns(
    rows: Mapping[str, Callable[[], object]], *, num_rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Time each row once a round, in the opposite order in every other round.

    Whatever drifts (a neighbour's load, the clock) then meets all of them alike. One round before
    the first warms up.

    Returns:
        each row's times by round, in ms: of all threads' CPU, or on a GPU the wall clock's.
    """
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(-1, num_rounds):
        names = list(rows)[:: -1 if turn % 2 else 1]
        for name in names:
            start = read_clock_ms(device)
            rows[name]()
            if turn >= 0:
                times[name].append(read_clock_ms(device) - start)
    return times


def read_clock_ms(device: torch.device) -> float:
    """Return the time that counts on a device, in ms."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter() * 1e3
    return time.process_time() * 1e3


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Return how many times as fast `to` is as `of`, round by round."""
    return [one / other for one, other in zip(of, to, strict=True)]


def describe_machine(
    device: torch.device,
    *,
    num_threads: int | None = None,
    versions: Mapping[str, str] | None = None,
) -> str:
    """Name what the numbers belong to: processor or GPU, threads, versions, commit.

    Args:
        device: what computes.
        num_threads: of the process that was measured; by default this one's.
        versions: of its packages, by name; by default this process's torch.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = f"{num_threads or torch.get_num_threads()} thread(s)"
    packages = [f"{n} {v}" for n, v in (versions or {"torch": torch.__version__}).items()]
    commit = (git_commit() or "no commit")[:10]
    return ", ".join([name, threads, *packages, f"commit {commit}"])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} core(s)" if names else platform.processor()
