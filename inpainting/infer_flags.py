"""Every flag of infer.py, in the guide's groups, with its default and its bounds.

Imports neither torch nor diffusers: --help answers at once.
"""

from __future__ import annotations

import argparse
import logging

from inpainting.arguments import OneLineParser

logger = logging.getLogger(__name__)

SCHEDULERS = ("ddpm", "ddim", "unipc", "dpmsolver++", "euler_a")
PRECISIONS = ("auto", "16-mixed", "bf16-mixed", "32")
PREDICTION_TYPES = ("auto", "epsilon", "v_prediction")
MAX_SEED = 2**62
MAX_STEPS = 1000  # the training schedule has no more
MAX_SCALE = 100
MAX_PX = 16384
MAX_IMAGES = 10000


def build_parser() -> argparse.ArgumentParser:
    """Return the command's flags, in the groups of the manual."""
    parser = OneLineParser(
        prog="infer.py",
        description="Fill the holes of pictures with a trained ControlNet.",
        allow_abbrev=False,
    )
    parser.speaker = parser.prog
    _add_data_flags(parser.add_argument_group("data"))
    _add_model_flags(parser.add_argument_group("model"))
    _add_sampling_flags(parser.add_argument_group("sampling"))
    add = parser.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--precision", choices=PRECISIONS, default="auto")
    return parser


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--input_image", required=True, help="picture, or a folder of pictures")
    add("--input_mask", required=True, help="mask, white = fill, or a folder of masks")
    add("--invert_mask", action="store_true", help="black = fill")
    add("--mask_grow", type=int, default=0, help="grow the hole by so many pixels")
    add(
        "--mask_blur", type=int, default=0, help="pixels outside the hole over which the fill fades"
    )
    add("--crop_to_mask", action="store_true", help="work on the hole's surroundings: more detail")
    add("--output_dir", default="./outputs/inference", help="where results go")


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--checkpoint_path", required=True,
        help="controlnet.pth, final_model folder, Lightning .ckpt or single file",
    )  # fmt: skip
    add(
        "--pretrained_model_name_or_path",
        help="the base: hub id, folder or file (default: what the weights record)",
    )
    add("--base_config", help="folder or hub id of a single file's configurations")
    add("--prediction_type", choices=PREDICTION_TYPES, default="auto")


def _add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prompt", default="", help="what to fill the hole with")
    add("--negative_prompt", default="", help="what not to fill it with")
    add("--scheduler", choices=SCHEDULERS, default="ddim")
    add("--num_inference_steps", type=int, default=50)
    add("--guidance_scale", type=float, default=7.5, help="1 = no guidance")
    add("--conditioning_scale", type=float, default=1.0, help="weight of the ControlNet")
    add("--strength", type=float, default=1.0, help="below 1 starts from what is under the hole")
    add("--num_images", type=int, default=1, help="results per picture")
    add("--seed", type=int, default=42, help="result i has seed + i")
    add("--image_size", type=int, help="short side worked at, pixels (default: what was trained)")


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what can't work, before anything is loaded; warn about what has no effect.

    Raises:
        ValueError: one line that names the flag.
    """
    bounds = {
        "mask_grow": (0, MAX_PX), "mask_blur": (0, MAX_PX), "image_size": (8, MAX_PX),
        "num_images": (1, MAX_IMAGES), "num_inference_steps": (1, MAX_STEPS),
        "guidance_scale": (0, MAX_SCALE), "conditioning_scale": (0, MAX_SCALE),
        "seed": (0, MAX_SEED),
    }  # fmt: skip
    for name, (lowest, highest) in bounds.items():
        value = getattr(args, name)
        if value is not None and not lowest <= value <= highest:
            raise ValueError(f"--{name} must be in [{lowest}, {highest}], got {value}.")
    if args.negative_prompt and args.guidance_scale <= 1:
        logger.warning("--negative_prompt has no effect without guidance (--guidance_scale > 1).")
