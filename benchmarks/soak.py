"""Kill a run again and again at random moments, and see whether anything is lost.

    python -m benchmarks.soak --num_kills 50

Each kill takes the run's whole process group with SIGKILL; then `--resume_from_checkpoint last`
goes on. What comes out in the end is compared, bit for bit, with a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.same_bits import compare_runs, read_curves
from demo.random_base import write_random_base
from inpainting.arguments import OneLineParser
from inpainting.runs import read_checkpoint

ROOT = Path(__file__).parents[1]
SAVE_EVERY_N_STEPS = 3
# Everything that has a state; on the demo's scenes, with a base so small that most of the time is
# spent between steps: saving, validating, starting.
RUN_FLAGS = [
    "--batch_size", "2", "--num_epochs", "3", "--limit_train_batches", "100",
    "--accumulate_grad_batches", "2", "--val_split", "0.005", "--ema_decay", "0.9",
    "--lr_scheduler", "cosine", "--lr_warmup_steps", "4", "--num_workers", "2",
    "--save_every_n_epochs", "1", "--save_top_k", "2", "--log_every_n_steps", "1",
    "--save_every_n_steps", str(SAVE_EVERY_N_STEPS), "--accelerator", "cpu",
]  # fmt: skip
RESUME = ["--resume_from_checkpoint", "last"]
FAULT_LIMIT_S = 60.0  # for a killed group to be gone
FOREVER_S = 1e6
SHARE_AT_START = 0.25  # of the kills


class Group:
    """A training command with a process group of its own.

    Args:
        flags: of train_lightning.py.
        log_path: what it says is appended there.
    """

    def __init__(self, flags: Sequence[str], *, log_path: Path) -> None:
        with log_path.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "train_lightning.py", *flags],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def ends_within(self, seconds: float) -> bool:
        """Wait so long for its end."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is not None

    def wait_for_save(self, output_dir: Path) -> None:
        """Wait until it has saved last.ckpt anew below a folder, or has ended."""
        started = time.time()
        while not self.ends_within(0.02):
            if any(path.stat().st_mtime > started for path in find_last(output_dir)):
                return

    def kill(self) -> None:
        """Kill every process of the group, and wait until none is left.

        Raises:
            TimeoutError: one is.
        """
        deadline = time.monotonic() + FAULT_LIMIT_S
        while True:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            self.process.poll()
            if time.monotonic() > deadline:
                raise TimeoutError(f"a process of group {self.process.pid} doesn't end")
            time.sleep(0.05)


def check_after_kill(run_dir: Path, *, step_before: int) -> int:
    """Return the step of last.ckpt; every checkpoint must load, and none be older than before.

    Raises:
        ValueError: what was lost.
    """
    for path in (run_dir / "checkpoints").glob("*.ckpt"):
        read_checkpoint(path)
    step = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"]
    logged = max((max(curve) for curve in read_curves(run_dir).values()), default=0)
    if step < step_before or logged - step > SAVE_EVERY_N_STEPS:
        raise ValueError(f"last.ckpt holds step {step}, after {step_before}, {logged} were logged")
    return step


def find_last(output_dir: Path) -> list[Path]:
    """Return the last.ckpt of each run below a folder."""
    return [*output_dir.glob("*/checkpoints/last.ckpt")]


def disturb(
    flags: Sequence[str],
    *,
    output_dir: Path,
    num_kills: int,
    start_s: float,
    training_s: float,
    rng: random.Random,
) -> int:
    """Carry one run to its end through at most so many kills; returns how many there were.

    One kill in four meets the start; the others come after the first save, so that the run gets
    on however busy the machine is.

    Args:
        flags: of train_lightning.py.
        output_dir: of the run alone.
        num_kills: at most.
        start_s: what an undisturbed run took to its first save.
        training_s: and from there to its end.
        rng: draws the moments.

    Raises:
        RuntimeError: a start failed by itself.
        ValueError, TimeoutError: see check_after_kill and Group.kill.
    """
    flags = [*flags, "--output_dir", str(output_dir)]
    log_path, step = output_dir.with_suffix(".log"), -1
    for number in range(num_kills + 1):
        group = Group([*flags, *(RESUME if find_last(output_dir) else [])], log_path=log_path)
        if number == num_kills:
            has_ended = group.ends_within(FOREVER_S)
        elif rng.random() < SHARE_AT_START:
            has_ended = group.ends_within(rng.uniform(0, start_s))
        else:
            group.wait_for_save(output_dir)
            has_ended = group.ends_within(rng.uniform(0, training_s))
        group.kill()
        if has_ended:
            if group.process.returncode:
                raise RuntimeError(f"start {number + 1} failed: see {log_path}")
            return number
        for path in find_last(output_dir):
            step = check_after_kill(path.parents[1], step_before=step)
        print(f"kill {number + 1}: last.ckpt holds step {step}", flush=True)
    raise AssertionError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 where nothing was lost."""
    parser = OneLineParser(description="Kill a run at random moments and compare what it leaves.")
    parser.add_argument("--num_kills", type=int, default=50, help="(default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--output_dir", default="outputs/soak", help="(default outputs/soak)")
    args = parser.parse_args(argv)
    output_dir = Path(args.output_dir).absolute()
    output_dir.mkdir(parents=True, exist_ok=True)
    if any(output_dir.iterdir()):
        print(
            f"error: --output_dir must be empty, got {output_dir}. Remove it, or name another.",
            file=sys.stderr,
        )
        return 2
    return soak(args, output_dir=output_dir)


def soak(args: argparse.Namespace, *, output_dir: Path) -> int:
    """Compare runs that are killed, args.num_kills times together, with one that isn't."""
    base = write_random_base(output_dir / "base")
    flags = [*RUN_FLAGS, "--pretrained_model_name_or_path", str(base)]
    straight = output_dir / "straight"
    started = time.monotonic()
    group = Group([*flags, "--output_dir", str(straight)], log_path=output_dir / "straight.log")
    group.wait_for_save(straight)
    start_s = time.monotonic() - started
    group.ends_within(FOREVER_S)
    if group.process.returncode:
        print(f"the undisturbed run failed: see {output_dir / 'straight.log'}", file=sys.stderr)
        return 1
    training_s = time.monotonic() - started - start_s
    print(f"undisturbed: {start_s:.0f} s to the first save, then {training_s:.0f} s", flush=True)
    rng, num_kills, num_different = random.Random(args.seed), 0, 0
    for number in range(args.num_kills):
        if num_kills == args.num_kills:
            break
        folder = output_dir / f"disturbed_{number}"
        num_kills += disturb(
            flags, output_dir=folder, num_kills=args.num_kills - num_kills,
            start_s=start_s, training_s=training_s, rng=rng,
        )  # fmt: skip
        run_dirs = [path for path in folder.glob("*") if (path / "final_model").is_dir()]
        differences = compare_runs(*straight.glob("*"), *run_dirs)
        differences += [f"left behind: {path}" for path in folder.rglob(".*")]
        num_different += bool(differences)
        print("\n".join(differences) or f"{num_kills} kills so far: the same bits", flush=True)
    print(f"{num_kills} kills; {num_different} runs differ")
    return int(num_different > 0)


if __name__ == "__main__":
    sys.exit(main())
