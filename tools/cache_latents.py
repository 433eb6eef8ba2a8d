"""Fill the cache of the VAE's moments ahead of a training.

    python -m tools.cache_latents @coco.args

Takes the training's own flags. Training fills the cache by itself as it goes: this is for a machine
whose GPU is free before the others are, or for a first epoch that is as fast as the next ones. What
is kept already is passed over, so a stopped run goes on. Under torchrun each process takes a part.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from inpainting.arguments import answer
from inpainting.flags import DEFAULT_BASE, build_parser
from inpainting.preflight import check_flags, check_image_size, resolve_device
from inpainting.quiet import quiet_libraries
from inpainting.runs import is_first_process

logger = logging.getLogger("train_lightning")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = build_parser()
    parser.prog = "python -m tools.cache_latents"
    parser.description = __doc__
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logger.setLevel(logging.INFO if is_first_process() else logging.WARNING)
    return answer(lambda: fill(args))


def fill(args: argparse.Namespace) -> None:
    """Encode every view that the training of these flags will ask for and the cache lacks.

    Raises:
        FileNotFoundError, ValueError: there is nothing to fill, or too much of the data is bad, or
            the cache can't be written to.
    """
    check_flags(args)
    for name in ("check", "dry_run"):
        if getattr(args, name):
            raise ValueError(
                f"--{name} must be asked of train_lightning.py, got it here. Drop the flag."
            )
    if args.image_dir is None:
        raise ValueError(
            "--image_dir must name the training's pictures, got none. Name the folder."
        )
    if args.cache_latents == "off":
        raise ValueError("--cache_latents must be auto or a folder, got off. Drop the flag.")
    _resolve(args)
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from data import MissingViews
    from inpainting.inspection import open_training_data
    from inpainting.unreadable import UnreadablePictures
    from lightning_data import split_rows
    from lightning_module import FROZEN_DTYPES
    from lightning_run import describe_moments_cache, open_moments_cache, sample_rule
    from model import load_base

    index, unreadable_rows = open_training_data(args)
    base = load_base(args.pretrained_model_name_or_path, base_config=args.base_config)
    cache = open_moments_cache(args, base=base, index=index)
    assert cache is not None
    rule = sample_rule(args, base=base)
    train_rows, val_rows = split_rows(index.image_ids, val_split=args.val_split)
    num_slots = len(train_rows) * len(rule.views) + len(val_rows)
    describe_moments_cache(cache, num_slots=num_slots)
    device = torch.device(_device(args))
    base.place_vae(device, dtype=FROZEN_DTYPES[args.precision][1])
    missing = MissingViews(
        index,
        train_rows=train_rows,
        val_rows=val_rows,
        rule=rule,
        cache=cache,
        unreadable=UnreadablePictures(len(index), known=unreadable_rows, is_error=args.strict_data),
    )
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    loader = DataLoader(
        missing,
        sampler=range(rank, len(missing), world_size),
        batch_size=None,
        num_workers=args.num_workers,
    )
    for views in tqdm(loader, unit="picture", disable=not is_first_process()):
        for slot, image in views:
            cache.write(slot, base.encode_alone(image.to(device)))
        if not cache.is_writable:
            raise ValueError(
                "--cache_latents must have room for all latents, got a disk without: see the line "
                "above. Name a folder on a larger one."
            )
    logger.info("latents: %.2f GB are there: %s", cache.stored_bytes() / 1e9, cache.folder)


def _resolve(args: argparse.Namespace) -> None:
    """Choose what the flags leave open, as the training does."""
    quiet_libraries()
    from inpainting.base import read_base_config
    from inpainting.devices import keep_freed_memory

    args.pretrained_model_name_or_path = args.pretrained_model_name_or_path or DEFAULT_BASE
    config = read_base_config(args.pretrained_model_name_or_path, base_config=args.base_config)
    args.image_size = args.image_size or config.image_size
    check_image_size(args.image_size, config=config)
    resolve_device(args)
    keep_freed_memory(args.accelerator)


def _device(args: argparse.Namespace) -> str:
    """Return where to encode: this process's own GPU, or what --accelerator says."""
    if args.accelerator == "gpu":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return args.accelerator


if __name__ == "__main__":
    sys.exit(main())
