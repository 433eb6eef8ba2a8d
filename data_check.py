"""What --check does: read every record and every picture, list the faults, draw some samples.

Asks no base and imports no Lightning: the faults are the data's alone.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Container
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import SampleRule, cut_picture
from inpainting.atomic import replace_atomically
from inpainting.coco import CocoIndex
from inpainting.coco_records import is_fault
from inpainting.contact_sheet import SheetRow, draw_contact_sheet
from inpainting.diffusion import make_conditioning
from inpainting.inspection import format_table, num_cores, open_fault_file, open_index, read_all

logger = logging.getLogger("train_lightning")

IMAGE_SIZE_PX = 512  # where --image_size doesn't say: no base is asked for its own
NUM_SAMPLES = 12


def check_data(args: argparse.Namespace) -> int:
    """Read everything, and say what is wrong.

    Args:
        args: the checked flags, which name the data.

    Returns:
        The exit code: 1 where there is a fault, else 0.

    Raises:
        FileNotFoundError, ValueError: the files can't be what the flags say.
    """
    folder = Path(args.output_dir) / "data_check"
    with open_fault_file(folder / "faults.json") as faults:
        logger.info("reading the records")
        index = open_index(args, on_problem=faults.log.add_words)
        readings = read_all(index, num_processes=num_cores())
        bar = tqdm(readings, total=len(index), unit=" pictures", disable=None)
        unreadable = {row: fault for row, fault in bar if fault is not None}
        for _, fault in sorted(unreadable.items()):
            faults.log.add_words(*fault)
        num_rows = {**index.num_rows_read, "pictures": len(index)}
        samples = _draw_samples(args, index=index, without=unreadable, folder=folder)
        faults.finish({"num_rows": num_rows, "samples": samples})
    kinds = faults.log.kinds
    print(format_table(kinds, num_rows=num_rows))
    logger.info("every fault: %s", folder / "faults.json")
    logger.info("samples as they are trained on: %s", folder / "samples.png")
    return int(any(map(is_fault, kinds)))


def _draw_samples(
    args: argparse.Namespace, *, index: CocoIndex, without: Container[int], folder: Path
) -> list[dict[str, object]]:
    """Write the contact sheet, and return which samples it shows."""
    size = args.image_size or IMAGE_SIZE_PX
    rule = SampleRule(
        image_size=size,
        latent_shape=(4, size // 8, size // 8),
        num_train_timesteps=1000,
        mask_types=args.mask_types,
        mask_area_range=tuple(args.mask_area_range),
        empty_prompt_prob=args.empty_prompt_prob,
        num_crops=args.num_crops,
        seed=args.seed,
    )
    readable = [row for row in range(len(index)) if row not in without]
    chosen = np.linspace(0, len(readable) - 1, min(NUM_SAMPLES, len(readable)))
    sheet, samples = [], []
    for row in (readable[position] for position in chosen.astype(int)):
        picture, image_id = index.open_picture(row), int(index.image_ids[row])
        cut = cut_picture(index, row, picture=picture, rule=rule, epoch=0, is_training=True)
        seen = make_conditioning(
            torch.from_numpy(cut.image).permute(2, 0, 1)[None],
            torch.from_numpy(cut.mask)[None, None],
        )[0].numpy()
        sheet.append(SheetRow(cut.image, cut.mask, seen, f"id {image_id}", cut.prompt))
        name = index.image_path(row).relative_to(index.image_dir).as_posix()
        samples.append({"image_id": image_id, "file_name": name, "prompt": cut.prompt})
    if sheet:
        with replace_atomically(folder / "samples.png") as temporary:
            draw_contact_sheet(sheet).save(temporary, format="PNG")
    return samples
