"""See the whole path in a minute or two: `python -m demo` trains, then fills a hole.

It types the two commands for you and shows them, on pictures that the project draws.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image

from demo.defaults import UNSEEN_SEED
from demo.scenes import draw_scene
from inpainting.masks import draw_mask
from inpainting.randomness import generator

OUTPUT_DIR = Path("outputs") / "demo"
TRAINING = "--max_steps 100 --learning_rate 1e-4 --num_workers 0 --log_every_n_steps 10"
SAMPLING = "--num_inference_steps 20 --guidance_scale 3"
SCENE_SIZE_PX = 256
HOLE_AREA_RANGE = (0.15, 0.25)


def main() -> int:
    """Train, fill, say where the pictures lie; returns the exit code of what failed, or 0."""
    argparse.ArgumentParser(prog="python -m demo", description=__doc__).parse_args()
    print("The demo's base has random weights for now: every step is real, but the fill is noise.")
    status = run_command("train_lightning.py", f"{TRAINING} --output_dir {OUTPUT_DIR}")
    if status:
        return status
    weights = newest_run(OUTPUT_DIR) / "final_model" / "controlnet.pth"
    image_path, mask_path = draw_unseen_scene(OUTPUT_DIR)
    status = run_command(
        "infer.py",
        f"--checkpoint_path {weights} --input_image {image_path} --input_mask {mask_path} "
        f"{SAMPLING} --output_dir {OUTPUT_DIR}",
    )
    if status:
        return status
    print(f"\nLook at {OUTPUT_DIR / 'comparison.png'}: picture, hole, fill.")
    print("The fill is noise, since the base is random; around the hole no pixel has changed.")
    print(f"The run's curves and pictures: tensorboard --logdir {OUTPUT_DIR}")
    return 0


def run_command(script: str, arguments: str) -> int:
    """Show and run one of the project's commands; returns its exit code.

    In a process of its own, as a user starts it.
    """
    print(f"\n$ python {script} {arguments}", flush=True)
    path = Path(__file__).resolve().parent.parent / script
    return subprocess.run(
        [sys.executable, str(path), *shlex.split(arguments)], check=False
    ).returncode


def newest_run(output_dir: Path) -> Path:
    """Return the run folder that was made last."""
    return max(
        output_dir.glob("controlnet_inpainting_lightning_*"), key=lambda p: p.stat().st_mtime
    )


def draw_unseen_scene(folder: Path) -> tuple[Path, Path]:
    """Write a scene that training has not seen, and a hole; returns their paths."""
    image, _, _ = draw_scene(0, size=SCENE_SIZE_PX, seed=UNSEEN_SEED)
    mask = draw_mask(
        generator(UNSEEN_SEED, "mask"),
        size=SCENE_SIZE_PX,
        mask_types={"irregular": 1.0},
        area_range=HOLE_AREA_RANGE,
        object_masks=[],
    )
    image_path, mask_path = folder / "unseen_scene.png", folder / "unseen_mask.png"
    Image.fromarray(image).save(image_path)
    Image.fromarray(mask * 255).save(mask_path)
    return image_path, mask_path


if __name__ == "__main__":
    sys.exit(main())
