"""Fill the holes of pictures: ControlNet weights + picture + mask + prompt -> picture.

A single pair leaves inpainted.png (inpainted_1.png, inpainted_2.png ... with --num_images) and
comparison.png in --output_dir. Two folders are paired by file name, cat.jpg with cat.png or
cat_mask.png, and leave cat_inpainted.png, cat_inpainted_1.png ... and cat_comparison.png.
Result i is drawn from seed + i, whatever --num_images is.
"""

from __future__ import annotations

import argparse
import json
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
from inpainting.pairs import Job, Picture, find_jobs, read_picture, write_results
from inpainting.quiet import quiet_libraries
from inpainting.runs import cache_dir

if TYPE_CHECKING:  # the imports of torch and diffusers take seconds: --help must not
    import numpy as np

    from inpainting.record import InpaintingRecord
    from inpainting.sampling import InpaintPipeline
    from model import Base

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
    speakers = [logging.getLogger(name) for name in ("infer", "inpainting")]
    for speaker in speakers:
        speaker.addHandler(handler)
    try:
        yield
    finally:
        for speaker in speakers:
            speaker.removeHandler(handler)


def run(args: argparse.Namespace) -> int:
    """Check, load, fill and write; what the user can correct is told in one line."""
    read = partial(read_picture, invert_mask=args.invert_mask, mask_grow=args.mask_grow)
    try:
        check_flags(args)
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
    num_failed = 0
    for job in jobs:
        try:
            picture = first or read(job)
        except (ValueError, OSError) as error:
            logger.error("%s", error)
            num_failed += 1
            continue
        if not fill_job(job, picture=picture, pipeline=pipeline, image_size=image_size, args=args):
            return 1
    if num_failed:
        logger.error("%d of %d pairs failed, see above.", num_failed, len(jobs))
        return 2
    return 0


def fill_job(
    job: Job,
    *,
    picture: Picture,
    pipeline: InpaintPipeline,
    image_size: int,
    args: argparse.Namespace,
) -> bool:
    """Fill one picture, write the results and print where they are; whether that succeeded."""
    import torch

    try:
        results = fill(picture, pipeline=pipeline, image_size=image_size, args=args)
        paths = write_results(
            results, picture=picture, output_dir=Path(args.output_dir), prefix=job.prefix,
            mask_blur=args.mask_blur,
        )  # fmt: skip
    except (FloatingPointError, OSError) as error:
        logger.error("%s: %s", job.image_path, error)
        return False
    except torch.OutOfMemoryError:
        logger.error(
            "%s must fit into the device's memory, got out of memory. Lower --image_size, or use "
            "--crop_to_mask.", job.image_path,
        )  # fmt: skip
        return False
    print(*paths, sep="\n", flush=True)
    return True


def load(args: argparse.Namespace) -> tuple[InpaintPipeline, int]:
    """Load base and ControlNet into a pipeline on the device; return it with the working size.

    Raises:
        FileNotFoundError, ValueError: names the flag or file to correct.
    """
    from inpainting.checkpoints import find_record
    from inpainting.devices import choose_device
    from inpainting.interop import read_controlnet_weights
    from inpainting.sampling import make_pipeline, make_scheduler
    from model import build_controlnet, load_controlnet_weights

    device, dtype = choose_device(args.device, precision=args.precision)
    weights = read_controlnet_weights(args.checkpoint_path)
    record = find_record(args.checkpoint_path)
    base = load_matching_base(args, record=record)
    controlnet = build_controlnet(base.unet, stride=base.stride).requires_grad_(False).eval()
    load_controlnet_weights(controlnet, weights, source=args.checkpoint_path)
    # VAE and text encoder stay in float32: fp16 overflows in the first, and the second's dtype is
    # that of the latents between the steps.
    base.vae.to(device=device)  # type: ignore[call-arg]
    base.text_encoder.to(device=device)  # type: ignore[arg-type]
    base.unet.to(device=device, dtype=dtype)  # type: ignore[call-arg]
    controlnet.to(device=device, dtype=dtype)  # type: ignore[call-arg]
    pipeline = make_pipeline(
        vae=base.vae, unet=base.unet, text_encoder=base.text_encoder, tokenizer=base.tokenizer,
        controlnet=controlnet, scheduler=make_scheduler(args.scheduler, base.noise_scheduler),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipeline, args.image_size or (record or base).image_size


def load_matching_base(args: argparse.Namespace, *, record: InpaintingRecord | None) -> Base:
    """Load the base, and refuse or warn about one that the weights don't belong to."""
    from inpainting.checkpoints import base_hash
    from model import load_base

    name, base_config = choose_base(args, record=record)
    prediction_type = args.prediction_type
    if prediction_type == "auto" and record is not None:
        prediction_type = record.prediction_type
    base = load_base(name, base_config=base_config, prediction_type=prediction_type)
    check_record(record, base=base)
    recorded_hash = record.base_unet_sha256 if record else None
    if recorded_hash is not None and recorded_hash != base_hash(base.unet):
        logger.warning("%s is not the base that the weights were trained with.", name)
    return base


def choose_base(
    args: argparse.Namespace, *, record: InpaintingRecord | None
) -> tuple[str, str | None]:
    """Return the base to load and its configurations' place: the flags, or what was recorded.

    Raises:
        ValueError: nothing says which base the weights belong to, or where it is.
    """
    if args.pretrained_model_name_or_path:
        return args.pretrained_model_name_or_path, args.base_config
    if record is None:
        raise ValueError(
            f"{args.checkpoint_path} must come with a record of its base, got none beside it. "
            "Name the base that it was trained with: --pretrained_model_name_or_path."
        )
    if "/" in record.base:  # a hub id: names of folders and files have no slash
        return record.base, args.base_config
    # The record travels with the weights and holds no local paths: run.json stays and does.
    trained_on = read_run_arguments(Path(args.checkpoint_path))
    name = trained_on.get("pretrained_model_name_or_path")
    if name and Path(name).exists():
        return name, args.base_config or trained_on.get("base_config")
    if record.base == "demo":
        from demo.defaults import prepare_base

        return str(prepare_base(cache_dir() / "demo")), None
    raise ValueError(
        f"the base '{record.base}', which the weights were trained with, must be found, got no "
        "such folder in run.json. Name it with --pretrained_model_name_or_path."
    )


def read_run_arguments(checkpoint_path: Path) -> dict[str, str]:
    """Return the flags in run.json of the run that the weights lie in, {} outside a run."""
    folder = checkpoint_path.resolve()
    for candidate in (folder, *folder.parents[:2]):
        path = candidate / "run.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8")).get("arguments", {})
    return {}


def check_record(record: InpaintingRecord | None, *, base: Base) -> None:
    """Refuse weights that were trained for another geometry or another mark of the hole.

    Raises:
        ValueError: says what differs.
    """
    from inpainting.diffusion import HOLE_VALUE

    if record is None:
        return
    if record.vae_stride != base.stride:
        raise ValueError(
            f"the base's VAE must have the stride {record.vae_stride} of the weights' own base "
            f"({record.base}), got {base.stride}. Name that one: --pretrained_model_name_or_path."
        )
    if record.hole_value != HOLE_VALUE or record.image_range != (0.0, 1.0):
        raise ValueError(
            f"the weights must have learnt holes as {HOLE_VALUE:g} beside pixels in [0, 1], got "
            f"{record.hole_value:g} beside {list(record.image_range)}. Use a ControlNet of this "
            "trainer."
        )


def fill(
    picture: Picture, *, pipeline: InpaintPipeline, image_size: int, args: argparse.Namespace
) -> list[np.ndarray]:
    """Return the results, (H, W, 3) uint8 each; result i is a function of seed + i."""
    from inpainting.sampling import inpaint

    return [
        inpaint(
            pipeline,
            image=picture.image,
            mask=picture.mask,
            prompt=args.prompt,
            negative_prompt=args.negative_prompt,
            seed=args.seed + i,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            conditioning_scale=args.conditioning_scale,
            strength=args.strength,
            image_size=image_size,
            crop_to_mask=args.crop_to_mask,
            mask_blur=args.mask_blur,
        )
        for i in range(args.num_images)
    ]


if __name__ == "__main__":
    sys.exit(main())
