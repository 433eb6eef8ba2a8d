"""See a ControlNet learn to fill holes: `python -m demo` trains one from nothing and measures it.

It types two commands for you and shows them: training on scenes that the project draws, with its
own small base, and the evaluation on scenes that neither has seen. About a quarter of an hour on
two CPU cores.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT_DIR = Path("outputs") / "demo"
# What makes a ControlNet learn fast on this base: docs/log.md.
BATCH_SIZE = 32
TRAINING = (
    "--learning_rate 1.5e-3 --lr_scheduler cosine --lr_warmup_steps 30 "
    "--mask_types irregular=0.35,rectangle=0.25,object=0.4 --mask_area_range 0.1 0.5 "
    "--empty_prompt_prob 0.1 --val_split 0.02 --num_workers 0 "
    "--num_epochs 1000 --save_every_n_epochs 1000 --log_every_n_steps 20"
)
NUM_STEPS, NUM_PICTURES = 3300, 64
TRAINING_S = 660  # a slower CPU takes fewer steps
EVALUATION = (
    "--hole_kinds medium thick --num_samples 1 --guidance_scale 1.5 --num_inference_steps 3"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, say where the picture lies; returns the exit code of what failed, or 0."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument(
        "--max_steps", type=int,
        help=f"optimizer steps (default: what fits into {TRAINING_S // 60} minutes of training, "
        f"{NUM_STEPS} at the most)",
    )  # fmt: skip
    parser.add_argument("--num_pictures", type=int, default=NUM_PICTURES, help="to evaluate on")
    args = parser.parse_args(argv)
    precision, num_steps = choose_training()
    num_steps = args.max_steps or num_steps
    status = run_command(
        "train_lightning.py",
        f"{split_batch()} {TRAINING} --precision {precision} "
        f"--max_steps {num_steps} --output_dir {OUTPUT_DIR}",
    )
    if status:
        return status
    run_dir = newest_run(OUTPUT_DIR)
    status = run_command(
        "-m tools.evaluate",
        f"--checkpoint_path {run_dir}/final_model/controlnet.pth {EVALUATION} "
        f"--precision {precision} --num_pictures {args.num_pictures} "
        f"--output_dir {run_dir}/evaluation",
    )
    if status:
        return status
    print(f"\nLook at {run_dir}/evaluation/sheet.png: what was given, the hole, the base without")
    print("ControlNet, the base with the ControlNet that you trained, and the truth.")
    print(f"The run's curves and pictures: tensorboard --logdir {OUTPUT_DIR}")
    return 0


def choose_training() -> tuple[str, int]:
    """Return --precision and the number of steps: on a CPU, what fits into `TRAINING_S`."""
    import torch

    if torch.accelerator.is_available():
        return "auto", NUM_STEPS
    from demo.pace import measure_pace

    print("measuring how fast this CPU trains", flush=True)
    num = num_processes()
    paces = measure_pace(batch_size=BATCH_SIZE // num, num_processes=num)
    precision = min(paces, key=lambda name: paces[name].step_s)
    training_s = partial(paces[precision].training_s, batch_size=BATCH_SIZE, num_processes=num)
    num_steps = bisect_right(range(NUM_STEPS + 1), TRAINING_S, key=training_s) - 1
    return precision, max(num_steps, 1)


def num_processes() -> int:
    """Return how many train: one on a GPU, one on each of two cores: faster than two threads."""
    import torch

    is_one = torch.accelerator.is_available() or (os.cpu_count() or 1) < 2
    return 1 if is_one else 2


def split_batch() -> str:
    """Return the flags that share `BATCH_SIZE` among the processes."""
    if num_processes() == 1:
        return f"--batch_size {BATCH_SIZE}"
    return f"--batch_size {BATCH_SIZE // 2} --devices 2 --strategy ddp"


def run_command(script: str, arguments: str) -> int:
    """Show and run one of the project's commands, in a process of its own, as a user starts it.

    Returns:
        Its exit code.
    """
    print(f"\n$ python {script} {arguments}", flush=True)
    what = shlex.split(script) if script.startswith("-m ") else [str(ROOT / script)]
    command = [sys.executable, *what, *shlex.split(arguments)]
    places = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # for `-m`
    return subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": places}).returncode


def newest_run(output_dir: Path) -> Path:
    """Return the run folder that was made last."""
    return max(
        output_dir.glob("controlnet_inpainting_lightning_*"), key=lambda p: p.stat().st_mtime
    )


if __name__ == "__main__":
    sys.exit(main())
