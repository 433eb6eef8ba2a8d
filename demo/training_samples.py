"""Draw the README's picture: samples as training cuts them, out of drawn scenes.

    python -m demo.training_samples docs/training_sample.png

Each column is one sample. Rows: the picture; the hole, white; what the ControlNet sees. The hole's
-1 is no colour: it is painted magenta here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTokenizer

from data import CocoInpaintingDataset, SampleRule
from demo.random_base import write_byte_tokenizer
from demo.scenes import write_scenes
from inpainting.coco import CocoIndex
from inpainting.diffusion import make_conditioning

NUM_COLUMNS = 6
SIZE_PX = 160
GAP_PX = 4
SEED = 12
MARK = (255, 0, 200)  # stands for -1
MASK_TYPES = {"irregular": 0.4, "rectangle": 0.2, "object": 0.2, "outpaint": 0.2}


def main() -> None:
    """Write the picture to the path on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output_path", type=Path, help="a .png file")
    output_path = parser.parse_args().output_path
    with TemporaryDirectory() as folder:
        dataset = build_dataset(Path(folder))
        columns = [draw_column(dataset, position) for position in range(NUM_COLUMNS)]
    gap = np.full((columns[0].shape[0], GAP_PX, 3), 255, dtype=np.uint8)
    parts = [part for column in columns for part in (gap, column)]
    Image.fromarray(np.concatenate(parts[1:], axis=1)).save(output_path, optimize=True)


def build_dataset(folder: Path) -> CocoInpaintingDataset:
    """Draw scenes as a COCO folder, and read it as training does."""
    write_scenes(folder, num_scenes=NUM_COLUMNS, size=SIZE_PX * 5 // 4, seed=SEED)
    write_byte_tokenizer(folder / "tokenizer")
    index = CocoIndex.from_annotations(
        folder / "images",
        ann_file=folder / "annotations" / "instances.json",
        caption_file=folder / "annotations" / "captions.json",
        cache_dir=folder / "cache",
    )
    rule = SampleRule(
        image_size=SIZE_PX,
        latent_shape=(4, SIZE_PX // 8, SIZE_PX // 8),
        num_train_timesteps=1000,
        mask_types=MASK_TYPES,
        mask_area_range=(0.1, 0.3),
        empty_prompt_prob=0.5,
        seed=SEED,
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    rows = range(len(index))
    return CocoInpaintingDataset(index, rows=rows, tokenizer=tokenizer, rule=rule, is_training=True)


def draw_column(dataset: CocoInpaintingDataset, position: int) -> np.ndarray:
    """Return one sample as three pictures, one below the other, (H, W, 3) uint8."""
    sample = dataset[0, position]
    image, mask = sample["image"], sample["mask"]
    seen = make_conditioning(image[None], mask[None])[0]
    seen = (seen.clamp(min=0) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    hole = mask[0].numpy() == 1
    seen[hole] = MARK
    white = np.repeat(hole[..., None] * np.uint8(255), 3, axis=2)
    gap = np.full((GAP_PX, SIZE_PX, 3), 255, dtype=np.uint8)
    return np.concatenate([image.permute(1, 2, 0).numpy(), gap, white, gap, seen])


if __name__ == "__main__":
    main()
