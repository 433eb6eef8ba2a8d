"""A run's folder: where it is, what it is called, how a run is found again.

outputs/controlnet_inpainting_lightning_<time>/
    run.json  run.log  events.out.tfevents...  checkpoints/  final_model/
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from inpainting.atomic import replace_atomically, write_text_atomically

RUN_PREFIX = "controlnet_inpainting_lightning_"
# Ctrl-C; what schedulers send before they kill; what SLURM sends as early as a job asks for it.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
RECORDED_PACKAGES = (
    "torch", "pytorch-lightning", "diffusers", "transformers", "accelerate", "safetensors",
    "pycocotools", "pillow", "numpy", "deepspeed",
)  # fmt: skip
# What a resume asks of a checkpoint file; other trainers' files lack some of it.
CHECKPOINT_PARTS = (
    "state_dict", "loops", "optimizer_states", "lr_schedulers", "callbacks", "loss_sums", "epoch",
    "global_step", "pytorch-lightning_version",
)  # fmt: skip


def cache_dir() -> Path:
    """Return the folder for what can be made again: indexes, demo pictures."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "controlnet-inpainting"


def is_first_process() -> bool:
    """Whether this process has global rank 0, by what launchers put into the environment."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def check_output_dir(path: Path, *, flag: str = "--output_dir") -> None:
    """Refuse a place for results, before anything is loaded, where no folder can be made.

    Raises:
        NotADirectoryError, PermissionError: what the flag names can't be written to.
    """
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        raise NotADirectoryError(
            f"{flag} must be a folder, got the file {existing}. Name another place."
        )
    try:  # what may be written to is known by trying: root may everywhere, but not in /proc
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise PermissionError(
            f"{flag} must be a folder that can be written to, got {path} "
            f"({error.strerror}). Name another place."
        ) from error


def new_run_dir(output_dir: Path) -> Path:
    """Make a run folder that no other run has, even one that starts in the same second.

    Raises:
        OSError: output_dir can't be written to.
    """
    name = RUN_PREFIX + time.strftime("%Y%m%d_%H%M%S")
    output_dir.mkdir(parents=True, exist_ok=True)
    for suffix in ("", *(f"_{number}" for number in range(2, 1000))):
        try:
            (output_dir / f"{name}{suffix}").mkdir()
        except FileExistsError:
            continue
        return output_dir / f"{name}{suffix}"
    raise FileExistsError(f"--output_dir must have room for a new run, got 999 named {name}.")


class RunLog(WatchedFileHandler):
    """run.log, with times; begun again, in its folder, where somebody deletes it under way."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir / "run.log", encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def _open(self) -> Any:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()


def lock_run_dir(run_dir: Path) -> None:
    """Keep other runs out of a run's folder for as long as this process lives.

    By a lock on its run.log, which the system takes back however the process ends. Forked loader
    workers don't inherit it: they may outlive a kill for some seconds.

    Raises:
        BlockingIOError: another run is going on there.
    """
    descriptor = os.open(run_dir / "run.log", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BlockingIOError(
            f"a run folder must have no other run going on in it, got {run_dir}, which has. Stop "
            "that run first; to train beside it, start one without --resume_from_checkpoint."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
            raise
    held = [descriptor]
    os.register_at_fork(after_in_child=lambda: os.close(held.pop()) if held else None)


def run_dir_of(checkpoint_path: Path) -> Path | None:
    """Return the run folder that a checkpoint lies in, None where it was moved elsewhere."""
    run_dir = checkpoint_path.absolute().parent.parent
    is_in_run = checkpoint_path.absolute().parent.name == "checkpoints"
    return run_dir if is_in_run and (run_dir / "run.json").is_file() else None


def find_checkpoint(name: str, *, output_dir: Path) -> Path:
    """Resolve --resume_from_checkpoint.

    Args:
        name: a path, or "last": the newest run under output_dir with a loadable checkpoint.
        output_dir: where runs are.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the named one can't be loaded.
    """
    if name != "last":
        read_checkpoint(Path(name))
        return Path(name)
    paths = output_dir.glob(f"{RUN_PREFIX}*/checkpoints/*.ckpt")
    candidates = [path for path in paths if path.exists()]  # a link may lead nowhere
    for path in sorted(candidates, key=lambda path: path.stat().st_mtime, reverse=True):
        step = _loadable_step(path)
        if step is None:
            continue
        # A named checkpoint that max_steps cut out of an epoch has seen a validation that the
        # epoch hasn't come to yet; last.ckpt of the same step was written just before it.
        last = path.with_name("last.ckpt")
        return last if last.exists() and _loadable_step(last) == step else path
    raise FileNotFoundError(
        f"--resume_from_checkpoint last needs a run with a loadable checkpoint, got none under "
        f"{output_dir}. Name a checkpoint, or start without the flag."
    )


def _loadable_step(path: Path) -> int | None:
    """Return the optimizer step of a checkpoint (-1: DeepSpeed's), None where it can't be read."""
    try:
        return read_checkpoint(path).get("global_step", -1)
    except (ValueError, FileNotFoundError):
        return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training checkpoint without the power to run code; tensors stay on disk (mmap).

    A DeepSpeed checkpoint is a folder: it is checked for its marker only, and {} returned.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it isn't a training checkpoint of this trainer.
    """
    import torch

    from inpainting.interop import check_archive

    if path.is_dir() and (path / "latest").is_file():  # DeepSpeed writes it last
        return {}
    if not path.is_file():
        raise FileNotFoundError(
            f"--resume_from_checkpoint must be a checkpoint that exists, got {path}. "
            "`last` finds the newest one under --output_dir."
        )
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign file makes the unpickler fail in any way
        raise ValueError(
            f"{path} must be a training checkpoint, got a file that can't be read as one. "
            "Resume from another one in the same folder."
        ) from error
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    missing = [name for name in CHECKPOINT_PARTS if name not in parts]
    if missing:
        raise ValueError(
            f"{path} must be a training checkpoint of this trainer, got other weights (no "
            f"{missing[0]}). To continue from weights alone, use --controlnet_weights."
        )
    return parts


def read_run_state(path: Path) -> dict[str, Any]:
    """Return the `run_state` that a checkpoint was written with, and the paths of its run.json.

    Args:
        path: a checkpoint; DeepSpeed's folders and older files say nothing by themselves.
    """
    state = dict(read_checkpoint(path).get("run", {}))
    run_dir = run_dir_of(path)
    arguments = {}
    if run_dir is not None:
        arguments = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["arguments"]
    return {**state, "flags": {**arguments, **state.get("flags", {})}}


def check_deepspeed_shape(path: Path, *, strategy: str, world_size: int) -> None:
    """Refuse a DeepSpeed folder of another number of processes, or sharded in another way.

    Args:
        path: the folder; its file names tell both.
        strategy: --strategy.
        world_size: processes of this run.

    Raises:
        ValueError: names both.
    """
    names = [file.name for file in path.glob("*/*.pt")]
    ranks = {match[1] for name in names if (match := re.search(r"pp_rank_(\d+)_.*optim", name))}
    if ranks and len(ranks) != world_size:
        raise ValueError(
            f"a DeepSpeed checkpoint must go on with as many processes as it was written by, "
            f"{len(ranks)}, got {world_size}. Set --devices to match, or start a new run from its "
            "final_model with --controlnet_weights."
        )
    was_stage_3 = any("pp_rank" in name and name.endswith("model_states.pt") for name in names)
    if names and was_stage_3 != ("stage_3" in strategy):
        raise ValueError(
            f"a DeepSpeed checkpoint must go on with the ZeRO stage that it was written by, "
            f"{'3' if was_stage_3 else '1 or 2'}, got --strategy {strategy}. Resume with the "
            "strategy in that run's run.json."
        )


def check_strategy_can_read(path: Path, *, strategy: str) -> None:
    """Refuse DeepSpeed's folder without DeepSpeed, and the other strategies' file with it.

    Raises:
        ValueError: names both.
    """
    is_folder = path.is_dir()
    if is_folder == strategy.startswith("deepspeed"):
        return
    raise ValueError(
        f"--strategy {strategy} must get a checkpoint of its own kind, got "
        f"{'the DeepSpeed folder' if is_folder else 'a file, not a DeepSpeed folder:'} {path}. "
        "Resume with the strategy in that run's run.json, or start a new run from its final_model "
        "with --controlnet_weights."
    )


def adopt_checkpoint(path: Path, *, run_dir: Path) -> None:
    """Copy a checkpoint that lies elsewhere to be a new run's last.ckpt.

    So the run can be resumed before its first own save is due.
    """
    last = run_dir / "checkpoints" / "last.ckpt"
    if path.is_dir():
        shutil.copytree(path, last.with_name("last.a"))
        last.symlink_to("last.a")
        return
    with replace_atomically(last) as temporary:
        shutil.copyfile(path, temporary)


def write_run_json(
    run_dir: Path,
    *,
    arguments: dict[str, Any],
    record: dict[str, Any],
    origin: Path | None = None,
) -> str:
    """Write what the run is: its resolved flags, versions and commit. Local paths stand only here.

    A resumed run keeps its earlier state in "history".

    Args:
        run_dir: the run's folder.
        arguments: the resolved flags.
        record: the InpaintingRecord of the weights to come, for infer.py on a .ckpt.
        origin: the checkpoint from elsewhere that the run began with.

    Returns:
        what was written.
    """
    path = run_dir / "run.json"
    history: list[Any] = []
    if path.is_file():
        earlier = json.loads(path.read_text())
        history = [*earlier.pop("history", []), earlier]
    run = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "arguments": arguments,
        "inpainting": record,
        "versions": {"python": platform.python_version(), **_package_versions()},
        "git_commit": git_commit(),
        **({} if origin is None else {"origin": str(origin.absolute())}),
        "history": history,
    }
    text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
    write_text_atomically(path, text)
    return text


def _package_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version  # a fifth of what --help imports

    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def git_commit() -> str | None:
    """Return the commit of this code, None outside a checkout."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
