"""What is checked before anything is loaded: combinations that can't work, or do nothing."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from inpainting.base import BaseConfig
from inpainting.runs import check_output_dir

logger = logging.getLogger(__name__)

MAX_SEED = 2**32 - 1  # NumPy's
BITSANDBYTES = "bitsandbytes>=0.50,<0.51"  # before 0.50 there is no 8-bit Adam on a CPU
BITSANDBYTES_CAPABILITY = (6, 0)
# Launchers tell each machine by one of these where the others are: torchrun, SLURM, LSF.
NODE_VARIABLES = ("MASTER_ADDR", "SLURM_JOB_ID", "LSB_JOBID")
DEEPSPEED_STRATEGIES = (
    "deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload",
    "deepspeed_stage_3", "deepspeed_stage_3_offload",
)  # fmt: skip
STRATEGIES = ("auto", "ddp", *DEEPSPEED_STRATEGIES)
# What can rank checkpoints, and whether its least or its greatest value is the best.
MONITORS = {
    "val/loss": "min", "val/loss_hole": "min", "val/control_gain": "max", "val/psnr_hole": "max",
    "train_loss": "min",
}  # fmt: skip


def check_flags(args: argparse.Namespace) -> list[str]:
    """Refuse what can't work by the flags alone, without importing torch.

    Returns:
        warnings: one line for each flag that has no effect.

    Raises:
        ValueError, FileNotFoundError: in the words of the flags.
    """
    _check_ranges(args)
    _check_paths(args)
    if args.find_lr and args.strategy in DEEPSPEED_STRATEGIES:
        raise ValueError(
            f"--find_lr must run without DeepSpeed, got --strategy {args.strategy}. "
            "Search on one device: --strategy auto --devices 1."
        )
    if args.use_8bit_adam:
        _check_8bit_adam(args)
    if args.compile != "off":
        _check_compiler()
    if args.find_lr and args.resume_from_checkpoint:
        raise ValueError("--find_lr starts from fresh weights, got --resume_from_checkpoint too.")
    if args.ema_decay and args.strategy.startswith("deepspeed_stage_3"):
        raise ValueError(
            f"--ema_decay needs whole parameters on each device, got --strategy {args.strategy}. "
            "Use --strategy deepspeed_stage_2 or ddp."
        )
    if args.controlnet_weights and args.resume_from_checkpoint:
        raise ValueError(
            "--controlnet_weights starts a new run and --resume_from_checkpoint goes on with an "
            "old one, got both. Drop one of them."
        )
    if args.val_split == 0:
        _check_without_validation(args)
    if args.strategy in DEEPSPEED_STRATEGIES and args.accelerator in ("cpu", "mps", "tpu"):
        raise ValueError(
            f"--strategy {args.strategy} needs CUDA, got --accelerator {args.accelerator}. "
            "Use --strategy ddp."
        )
    if args.num_nodes > 1 and not any(name in os.environ for name in NODE_VARIABLES):
        raise ValueError(
            f"--num_nodes {args.num_nodes} needs a launcher on each machine, got none: this one "
            "would wait for the others for ever. Start it with torchrun --nnodes, see the manual."
        )
    has_no_objects = args.image_dir and not args.ann_file  # the demo's scenes have them
    if list(args.mask_types) == ["object"] and has_no_objects:
        raise ValueError(
            "--mask_types object needs instance masks, got no --ann_file. Name the instances json."
        )
    return _warnings(args)


def _check_8bit_adam(args: argparse.Namespace) -> None:
    if args.strategy in DEEPSPEED_STRATEGIES:
        raise ValueError(
            f"--use_8bit_adam must run without DeepSpeed, got --strategy {args.strategy}: "
            "it shards Adam's state instead. Drop one of the two."
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "--use_8bit_adam needs bitsandbytes, got an installation without. Install it: "
            f"pip install '{BITSANDBYTES}', or drop the flag."
        )


def _check_compiler() -> None:
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    if not any(map(shutil.which, names)):
        raise ValueError(
            "--compile needs a C++ compiler (g++ or clang++, or the one that $CXX names), got "
            "none. Install one, or drop the flag."
        )


def _check_without_validation(args: argparse.Namespace) -> None:
    if args.early_stopping_patience:
        raise ValueError(
            "--early_stopping_patience watches val/loss, got --val_split 0. Set --val_split 0.05."
        )
    if args.monitor and args.monitor.startswith("val/"):
        raise ValueError(
            f"--monitor {args.monitor} needs pictures that validate, got --val_split 0. "
            "Set --val_split 0.05, or --monitor train_loss."
        )


def _check_ranges(args: argparse.Namespace) -> None:
    for name, least in (
        ("batch_size", 1), ("num_workers", 0), ("num_epochs", 1), ("max_steps", -1),
        ("accumulate_grad_batches", 1), ("save_every_n_epochs", 1), ("save_every_n_steps", 1),
        ("save_top_k", -1), ("log_every_n_steps", 1), ("log_images_every_n_steps", 0),
        ("lr_warmup_steps", 0), ("num_nodes", 1), ("overfit_batches", 0), ("seed", 0),
        ("num_crops", 1),
    ):  # fmt: skip
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    if args.seed > MAX_SEED:
        raise ValueError(f"--seed must be at most {MAX_SEED}, got {args.seed}.")
    if args.max_steps == 0:
        raise ValueError("--max_steps must be positive, or -1 for no limit, got 0.")
    for name in ("val_split", "empty_prompt_prob", "max_bad_fraction"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} must be in [0, 1], got {getattr(args, name)}.")
    if args.val_split == 1:
        raise ValueError("--val_split must leave pictures to train on, got 1. Try 0.05.")
    if not 0 < args.learning_rate < math.inf:
        raise ValueError(f"--learning_rate must be positive, got {args.learning_rate}. Try 1e-5.")
    if not 0 <= args.adam_weight_decay < math.inf:
        raise ValueError(f"--adam_weight_decay must be at least 0, got {args.adam_weight_decay}.")
    if not 0 <= args.gradient_clip_val < math.inf:
        raise ValueError(f"--gradient_clip_val must be at least 0, got {args.gradient_clip_val}.")
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        raise ValueError(f"--ema_decay must be between 0 and 1, got {args.ema_decay}. Try 0.9999.")
    if args.snr_gamma is not None and not args.snr_gamma > 0:
        raise ValueError(f"--snr_gamma must be positive, got {args.snr_gamma}. Try 5.")
    if args.early_stopping_patience is not None and args.early_stopping_patience < 1:
        raise ValueError(
            f"--early_stopping_patience must be at least 1, got {args.early_stopping_patience}."
        )
    limit = args.limit_train_batches
    if limit is not None and not (limit > 0 and (isinstance(limit, int) or limit <= 1)):
        raise ValueError(
            "--limit_train_batches must be a number of batches (10) or a share in (0, 1] (0.1), "
            f"got {limit}."
        )


def _check_paths(args: argparse.Namespace) -> None:
    if args.image_dir and not Path(args.image_dir).is_dir():
        raise FileNotFoundError(
            f"--image_dir must be a folder that exists, got {args.image_dir}. Check the path."
        )
    for name in ("ann_file", "caption_file", "controlnet_weights"):
        value = getattr(args, name)
        if value and not Path(value).exists():
            raise FileNotFoundError(f"--{name} must exist, got {value}. Check the path.")
        if value and not args.image_dir and name != "controlnet_weights":
            raise ValueError(f"--{name} needs --image_dir, got none. Name the pictures' folder.")
    check_output_dir(Path(args.output_dir))
    if args.cache_latents not in ("auto", "off"):
        check_output_dir(Path(args.cache_latents), flag="--cache_latents")


def _warnings(args: argparse.Namespace) -> list[str]:
    """Name the flags that have no effect here."""
    warnings = []
    if args.image_dir and not args.ann_file:
        warnings.append("no --ann_file: there are no object holes and no prompts from categories")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        warnings.append(
            "--lr_warmup_steps has no effect with --lr_scheduler constant: use constant_with_warmup"
        )
    if args.base_config and not Path(args.pretrained_model_name_or_path or "").is_file():
        warnings.append("--base_config has no effect: the base is not a single file")
    if args.monitor and args.save_top_k < 1:
        kept = "all" if args.save_top_k else "none"
        warnings.append(f"--monitor has no effect: --save_top_k {args.save_top_k} keeps {kept}")
    if args.overfit_batches and args.limit_train_batches:
        warnings.append("--limit_train_batches limits what --overfit_batches already chose")
    return warnings


def check_image_size(image_size: int, *, config: BaseConfig) -> None:
    """Refuse sizes that the base's latents can't hold.

    Raises:
        ValueError: not a positive multiple of the VAE's stride.
    """
    if image_size < config.size_multiple or image_size % config.size_multiple:
        raise ValueError(
            f"--image_size must be a multiple of {config.size_multiple} (the VAE's stride), "
            f"got {image_size}. Try {max(image_size // 64 * 64, 64)}."
        )


def resolve_device(args: argparse.Namespace) -> None:
    """Choose accelerator, devices and precision, and refuse what this machine hasn't got.

    Args:
        args: its accelerator, devices and precision are replaced by what was chosen.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    from inpainting.devices import best_device_type, best_precision

    device_type = best_device_type()
    has_cuda = device_type == "cuda"
    if args.accelerator == "auto":
        args.accelerator = "gpu" if has_cuda else device_type
    uses_cuda = args.accelerator == "gpu"
    needs = {
        "gpu": ("CUDA", has_cuda),
        "mps": ("Apple's Metal", torch.backends.mps.is_available()),
        "tpu": ("torch_xla", find_spec("torch_xla") is not None),
    }
    need, is_here = needs.get(args.accelerator, ("", True))
    if not is_here:
        raise ValueError(
            f"--accelerator {args.accelerator} needs {need}, got a machine or a torch without. "
            f"Use --accelerator cpu, or install the build of torch that has {need}."
        )
    if args.strategy in DEEPSPEED_STRATEGIES and not uses_cuda:
        raise ValueError(
            f"--strategy {args.strategy} needs CUDA, got a machine or a torch without. "
            "Use --strategy ddp."
        )
    if args.use_8bit_adam:
        _check_8bit_device(args, uses_cuda=uses_cuda)
    args.devices = _parse_devices(args.devices, accelerator=args.accelerator)
    if args.precision == "auto":
        args.precision = best_precision("cuda" if uses_cuda else "cpu")
    if args.precision == "16-mixed" and args.accelerator == "cpu":
        logger.warning("warning: fp16 doesn't exist on CPU: --precision 16-mixed runs as bf16")
        args.precision = "bf16-mixed"


def _check_8bit_device(args: argparse.Namespace, *, uses_cuda: bool) -> None:
    import torch

    if uses_cuda:
        capability = torch.cuda.get_device_capability()
        if capability < BITSANDBYTES_CAPABILITY:
            raise ValueError(
                "--use_8bit_adam needs a GPU of CUDA capability 6.0, got "
                f"{'.'.join(map(str, capability))}. Drop the flag."
            )
    elif args.accelerator != "cpu":
        raise ValueError(
            f"--use_8bit_adam needs CUDA or a CPU, got --accelerator {args.accelerator}. "
            "Drop one of the two."
        )


def _parse_devices(text: str, *, accelerator: str) -> int | list[int]:
    """Return a number of devices (-1 = all) or a list of them.

    Raises:
        ValueError: neither, or a list on a CPU.
    """
    try:
        parts = text.removesuffix(",").split(",")  # "3," is the GPU with that number
        devices = [int(part) for part in parts] if "," in text else int(text)
    except ValueError:
        devices = 0
    if accelerator == "cpu":
        if isinstance(devices, list):
            raise ValueError(
                f"--devices must be a number of processes on CPU, got {text}. Try --devices 2."
            )
        devices = 1 if devices == -1 else devices
    if devices == 0 or (isinstance(devices, int) and devices < -1):
        raise ValueError(
            f"--devices must be a positive number, -1 for all, or a list like 0,2, got {text}."
        )
    return devices
