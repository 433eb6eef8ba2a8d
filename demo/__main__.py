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
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT_DIR = Path("outputs") / "demo"
# What makes a ControlNet learn fast on this base: docs/log.md.
BATCH_SIZE = 32
TRAINING = (
    "--learning_rate 3e-3 --lr_scheduler cosine --lr_warmup_steps 30 "
    "--mask_area_range 0.1 0.5 --empty_prompt_prob 0.1 --val_split 0.02 --num_workers 0 "
    "--num_epochs 1000 --save_every_n_epochs 1000 --log_every_n_steps 20"
)
NUM_STEPS, NUM_PICTURES = 1000, 64
SLOW_NUM_STEPS = 450  # where the CPU doesn't compute in bf16: ten minutes as well
EVALUATION = (
    "--hole_kinds medium thick --num_samples 1 --guidance_scale 1.5 --num_inference_steps 10"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, say where the picture lies; returns the exit code of what failed, or 0."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument(
        "--max_steps", type=int,
        help=f"optimizer steps (default {NUM_STEPS}; {SLOW_NUM_STEPS} on a CPU without bf16)",
    )  # fmt: skip
    parser.add_argument("--num_pictures", type=int, default=NUM_PICTURES, help="to evaluate on")
    args = parser.parse_args(argv)
    precision, is_fast = fast_precision()
    num_steps = args.max_steps or (NUM_STEPS if is_fast else SLOW_NUM_STEPS)
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


def fast_precision() -> tuple[str, bool]:
    """Return --precision, bf16 for a CPU that computes in it, and whether this machine is fast."""
    import torch

    if torch.accelerator.is_available():
        return "auto", True
    capabilities = torch.cpu.get_capabilities()
    computes = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return ("bf16-mixed", True) if computes else ("auto", False)


def split_batch() -> str:
    """Return flags for one GPU, or for a process on each of two cores: faster than two threads."""
    import torch

    if torch.accelerator.is_available() or (os.cpu_count() or 1) < 2:
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
