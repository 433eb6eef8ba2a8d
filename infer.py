"""Fill the holes of pictures: ControlNet weights + picture + mask + prompt -> picture.

A single pair leaves inpainted.png (inpainted_1.png, inpainted_2.png ... with --num_images) and
comparison.png in --output_dir. Two folders are paired by file name, cat.jpg with cat.png or
cat_mask.png, and leave cat_inpainted.png, cat_inpainted_1.png ... and cat_comparison.png.
Result i is drawn from seed + i, whatever --num_images is.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from inpainting.infer_flags import build_parser, check_flags
from inpainting.quiet import quiet_libraries
from inpainting.runs import check_output_dir

if TYPE_CHECKING:  # the imports of torch and diffusers take seconds: --help must not
    import numpy as np

    from inpainting.pairs import Job, Picture
    from inpainting.sampling import InpaintPipeline

logger = logging.getLogger("infer")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 or 2; a signal ends it with 130 or 143."""
    args = build_parser().parse_args(argv)
    # Not by an exception: it would be swallowed within an import or a destructor.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: os._exit(128 + signum))
    with one_line_each():
        return run(args)


class OneLine(logging.Formatter):
    """Shows a message in one line that says who speaks."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return f"infer.py: {' '.join(record.getMessage().split())}"


@contextmanager
def one_line_each() -> Iterator[None]:
    """Let this command and its parts, but no library, speak on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine())
    speakers = [logging.getLogger(name) for name in ("infer", "inpainting", "pipeline")]
    for speaker in speakers:
        speaker.addHandler(handler)
    try:
        yield
    finally:
        for speaker in speakers:
            speaker.removeHandler(handler)


def run(args: argparse.Namespace) -> int:
    """Check, load, fill and write; what the user can correct is told in one line."""
    from inpainting.pairs import find_jobs, read_picture

    read = partial(read_picture, invert_mask=args.invert_mask, mask_grow=args.mask_grow)
    try:
        check_flags(args)
        check_output_dir(Path(args.output_dir))
        jobs = find_jobs(Path(args.input_image), Path(args.input_mask))
        quiet_libraries()
        from inpainting.sampling import check_steps

        check_steps(num_inference_steps=args.num_inference_steps, strength=args.strength)
        # A lone bad mask is told of before loading for minutes.
        first = read(jobs[0]) if len(jobs) == 1 else None
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        pipeline, image_size = load(args)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 2
    num_bad = num_unfilled = 0
    for job in jobs:
        try:
            picture = first or read(job)
        except (ValueError, OSError) as error:
            logger.error("%s", error)
            num_bad += 1
            continue
        try:
            is_filled = fill_job(
                job, picture=picture, pipeline=pipeline, image_size=image_size, args=args
            )
        except OSError as error:  # the results have no room: the others' wouldn't either
            logger.error("%s: %s", job.image_path, error)
            return 1
        num_unfilled += not is_filled
    if len(jobs) > 1 and num_bad + num_unfilled:
        logger.error("%d of %d pairs failed, see above.", num_bad + num_unfilled, len(jobs))
    return 1 if num_unfilled else 2 if num_bad else 0


def fill_job(
    job: Job,
    *,
    picture: Picture,
    pipeline: InpaintPipeline,
    image_size: int,
    args: argparse.Namespace,
) -> bool:
    """Fill one picture, write the results and print where they are.

    Returns:
        Whether the networks could: another picture may still be small enough.

    Raises:
        OSError: the results can't be written.
    """
    import torch

    from inpainting.pairs import write_results

    try:
        results = fill(picture, pipeline=pipeline, image_size=image_size, args=args)
    except FloatingPointError as error:
        logger.error("%s: %s", job.image_path, error)
        return False
    except torch.OutOfMemoryError:
        logger.error(
            "%s must fit into the device's memory, got out of memory. Lower --image_size, or use "
            "--crop_to_mask.", job.image_path,
        )  # fmt: skip
        return False
    paths = write_results(
        results, picture=picture, output_dir=Path(args.output_dir), prefix=job.prefix,
        mask_blur=args.mask_blur,
    )  # fmt: skip
    print(*paths, sep="\n", flush=True)
    return True


def load(args: argparse.Namespace) -> tuple[InpaintPipeline, int]:
    """Load base and ControlNet into a pipeline on the device; return it with the working size.

    Raises:
        FileNotFoundError, ValueError: names the flag or file to correct.
    """
    from demo.defaults import BASE_DIR
    from pipeline import load_from_flags

    loaded = load_from_flags(args, demo_base=BASE_DIR)
    loaded.pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
    tokenizer = loaded.base.tokenizer
    for flag, text in (("--prompt", args.prompt), ("--negative_prompt", args.negative_prompt)):
        num_tokens = len(tokenizer(text).input_ids)
        if num_tokens > tokenizer.model_max_length:
            logger.warning(
                "%s has %d tokens: what comes after the first %d is not read.", flag, num_tokens,
                tokenizer.model_max_length,
            )  # fmt: skip
    return loaded.pipeline, args.image_size or loaded.image_size


def fill(
    picture: Picture, *, pipeline: InpaintPipeline, image_size: int, args: argparse.Namespace
) -> list[np.ndarray]:
    """Return the results, (H, W, 3) uint8 each; result i is a function of seed + i."""
    from inpainting.sampling import inpaint

    # One call each: as a batch, a result would depend on how many are asked for.
    return [
        inpaint(
            pipeline,
            image=picture.image,
            mask=picture.mask,
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            seeds=[args.seed + i],
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            conditioning_scale=args.conditioning_scale,
            strength=args.strength,
            image_size=image_size,
            crop_to_mask=args.crop_to_mask,
            mask_blur=args.mask_blur,
        )[0]
        for i in range(args.num_images)
    ]


if __name__ == "__main__":
    sys.exit(main())
