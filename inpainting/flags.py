"""Every flag of train_lightning.py, in the guide's groups, with its default.

Imports neither torch nor Lightning: --help answers at once.
"""

from __future__ import annotations

import argparse
import re
import shlex
from typing import NoReturn

from inpainting.arguments import OneLineParser
from inpainting.mask_flags import parse_mask_types
from inpainting.preflight import MONITORS, STRATEGIES

DEFAULT_BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
LR_SCHEDULERS = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
)  # fmt: skip


class ArgumentParser(OneLineParser):
    """Reads arguments from an @file as a shell would: many a line, quotes, # comments."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split one line of the file."""
        return shlex.split(arg_line, comments=True)

    def error(self, message: str) -> NoReturn:
        """Name an @file that can't be read in words, not by its number in errno.h."""
        system_error = re.fullmatch(r"\[Errno \d+\] (.*): '(.*)'", message)
        if system_error:
            reason, path = system_error.groups()
            message = f"@ must be followed by a file of arguments, got {path} ({reason})"
        super().error(message)


def parse_fraction_or_count(text: str) -> int | float:
    """Parse "10" as a number of batches and "0.1" as a share."""
    return float(text) if "." in text else int(text)


def parse_mask_type_mixture(text: str) -> dict[str, float]:
    """Let argparse show parse_mask_types' own words."""
    try:
        return parse_mask_types(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build_parser() -> argparse.ArgumentParser:
    """Return every flag of the command, in the guide's groups."""
    parser = ArgumentParser(
        description="Train a ControlNet that fills holes in photographs.",
        epilog="Arguments can be kept in a file: train_lightning.py @my_run.args",
        fromfile_prefix_chars="@",
        allow_abbrev=False,
    )
    _add_data_flags(parser.add_argument_group("data"))
    _add_model_flags(parser.add_argument_group("model"))
    _add_optimization_flags(parser.add_argument_group("optimization"))
    _add_run_flags(parser.add_argument_group("run"))
    return parser


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--image_dir", help="folder of the pictures; without it the demo's drawn scenes are used")
    add("--ann_file", help="COCO instances json: object holes, and prompts from category names")
    add("--caption_file", help="COCO captions json: prompts")
    add("--batch_size", type=int, default=4, help="pictures per device and step (default 4)")
    add("--num_workers", type=int, default=4, help="loader processes per device (default 4)")
    add("--image_size", type=int, help="pixels; default the base's own: SD 1.5 512, SD 2.1 768")
    add("--val_split", type=float, default=0.05, help="share that validates (default 0.05)")
    add(
        "--num_crops",
        type=int,
        default=1,
        help="fixed squares per picture, also mirrored (default 1)",
    )
    add(
        "--cache_latents",
        default="auto",
        metavar="{auto,off,DIR}",
        help="keep what the VAE's encoder says of each picture on disk: auto in the user's cache, "
        "in half of its free space at most (default auto)",
    )
    add(
        "--mask_types",
        type=parse_mask_type_mixture,
        default="irregular=0.5,rectangle=0.2,object=0.3",
        metavar="NAME=WEIGHT,...",
        help="mixture of irregular, rectangle, object, outpaint (default %(default)s)",
    )
    add(
        "--mask_area_range",
        type=float,
        nargs=2,
        default=(0.1, 0.3),
        metavar=("LEAST", "MOST"),
        help="share of the picture that is hole (default 0.1 0.3)",
    )
    add(
        "--max_bad_fraction",
        type=float,
        default=0.01,
        help="largest share of bad records or unreadable pictures to start with (default 0.01)",
    )
    add("--strict_data", action="store_true", help="leave nothing out: a bad row is an error")
    add("--check", action="store_true", help="read all records and pictures, report, then stop")


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--pretrained_model_name_or_path",
        help="the frozen base: hub id, diffusers folder, or single .safetensors/.ckpt file with "
        f"--base_config (default {DEFAULT_BASE}; with the demo's scenes the demo's own)",
    )
    add("--base_config", help="single file only: folder or hub id of configurations and tokenizer")
    add(
        "--prediction_type",
        choices=("auto", "epsilon", "v_prediction"),
        default="auto",
        help="what the base predicts; auto: as its scheduler says (default)",
    )
    add(
        "--controlnet_weights",
        help="continue from a ControlNet: controlnet.pth, diffusers folder, or single file",
    )


def _add_optimization_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--num_epochs", type=int, default=100, help="rounds through the pictures (default 100)")
    add("--max_steps", type=int, default=-1, help="optimizer steps at most (default -1: no limit)")
    add("--learning_rate", type=float, default=1e-5, help="AdamW's peak (default 1e-5)")
    add("--adam_weight_decay", type=float, default=1e-2, help="AdamW's (default 1e-2)")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="(default constant)")
    add("--lr_warmup_steps", type=int, default=0, help="optimizer steps of warm-up (default 0)")
    add("--gradient_clip_val", type=float, default=1.0, help="global norm; 0: off (default 1.0)")
    add("--accumulate_grad_batches", type=int, default=1, help="batches per step (default 1)")
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations, the frozen UNet's decoder too: less memory, slower",
    )
    add(
        "--use_8bit_adam",
        action="store_true",
        help="keep AdamW's moments in 8 bits: 2 GiB less; needs bitsandbytes",
    )
    add(
        "--compile",
        choices=("off", "regional", "full"),
        default="off",
        help="torch.compile: regional the networks' blocks, full all at once; the first step then "
        "takes minutes, the others less (default off)",
    )
    add("--ema_decay", type=float, help="average the ControlNet's parameters, e.g. 0.9999")
    add("--snr_gamma", type=float, help="Min-SNR loss weights, e.g. 5")
    add("--empty_prompt_prob", type=float, default=0.5, help="prompts dropped (default 0.5)")
    add(
        "--precision",
        choices=("auto", "16-mixed", "bf16-mixed", "32"),
        default="auto",
        help="auto: bf16 on CUDA >= 8.0, fp16 on older CUDA, 32 elsewhere (default)",
    )
    add("--find_lr", action="store_true", help="print and plot a learning-rate search, then stop")
    add("--early_stopping_patience", type=int, help="validations without a better val/loss")


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output_dir", default="./outputs", help="where run folders go (default ./outputs)")
    add(
        "--accelerator", choices=("auto", "gpu", "cpu", "tpu", "mps"), default="auto", help="(auto)"
    )
    add("--devices", default="-1", help="a number, -1 for all, or a list 0,2 (default -1)")
    add("--num_nodes", type=int, default=1, help="machines (default 1)")
    add("--strategy", choices=STRATEGIES, default="auto", help="(default auto)")
    add("--seed", type=int, default=42, help="of everything random (default 42)")
    add("--deterministic", action="store_true", help="only deterministic GPU kernels: slower")
    add("--save_every_n_epochs", type=int, default=5, help="named checkpoints (default 5)")
    add("--save_every_n_steps", type=int, default=1000, help="last.ckpt (default 1000)")
    add("--save_top_k", type=int, default=3, help="named checkpoints kept; -1: all (default 3)")
    add(
        "--monitor",
        choices=MONITORS,
        help="what ranks them (default val/loss, or train_loss without a split)",
    )
    add("--log_every_n_steps", type=int, default=50, help="points in TensorBoard (default 50)")
    add("--log_images_every_n_steps", type=int, default=500, help="pictures; 0: none (default 500)")
    add("--resume_from_checkpoint", help="a .ckpt, or `last`: the newest run's under --output_dir")
    add("--overfit_batches", type=int, default=0, help="train on this many batches only: a test")
    add("--limit_train_batches", type=parse_fraction_or_count, help="per epoch: number or share")
    add("--profiler", choices=("simple", "advanced", "pytorch"), help="report into the run folder")
    add("--dry_run", action="store_true", help="print the resolved run and its sizes, then stop")
