"""Everything that a run needs, built from the resolved flags: networks, data, Trainer, folder."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL
import pytorch_lightning as pl
import torch
import transformers
from diffusers import ControlNetModel
from PIL import features

from data import SampleRule
from inpainting.changes import CHANGES_BITS, check_can_go_on, list_changes, run_state
from inpainting.checkpoints import base_hash
from inpainting.coco import CocoIndex
from inpainting.interop import describe_mismatch, read_controlnet_weights
from inpainting.latents import MomentsCache, cache_key, free_bytes, hash_encoder
from inpainting.record import InpaintingRecord
from inpainting.runs import (
    RunLog,
    adopt_checkpoint,
    cache_dir,
    check_deepspeed_shape,
    is_first_process,
    lock_run_dir,
    new_run_dir,
    read_checkpoint,
    read_run_state,
    run_dir_of,
    write_run_json,
)
from inpainting.unreadable import UnreadablePictures
from lightning_checkpoints import KeepRunFolder
from lightning_data import InpaintingDataModule, ResumePosition
from lightning_module import FROZEN_DTYPES, InpaintingControlNet
from lightning_trainer import build_trainer, least_world_size
from model import Base, build_controlnet, load_base, load_controlnet_weights

logger = logging.getLogger("train_lightning")


@dataclass
class Run:
    """A run that is ready to start.

    Attributes:
        args: the resolved flags: nothing is left to be chosen.
        trainer, module, datamodule: Lightning's three.
        record: how the weights will have to be used.
        run_dir: the run's folder; a placeholder on all but the first process.
        checkpoint_path: what to resume from, or None.
    """

    args: argparse.Namespace
    trainer: pl.Trainer
    module: InpaintingControlNet
    datamodule: InpaintingDataModule
    record: InpaintingRecord
    run_dir: Path
    checkpoint_path: Path | None


def assemble(
    args: argparse.Namespace,
    *,
    index: CocoIndex,
    unreadable_rows: Sequence[int],
    checkpoint_path: Path | None,
) -> Run:
    """Build the three parts of a Lightning run, and the folder that it writes to.

    Args:
        args: the resolved flags.
        index: the COCO records.
        unreadable_rows: those whose pictures are known to be unreadable, and have been named.
        checkpoint_path: what to resume from, or None.

    Raises:
        FileNotFoundError, ValueError: weights or data don't fit, in one line.
    """
    pl.seed_everything(args.seed, verbose=False)
    base = load_base(
        args.pretrained_model_name_or_path,
        base_config=args.base_config,
        prediction_type=args.prediction_type,
    )
    controlnet = build_controlnet(base.unet, stride=base.stride)
    if args.controlnet_weights:
        weights = read_controlnet_weights(args.controlnet_weights)
        load_controlnet_weights(controlnet, weights, source=args.controlnet_weights)
    state = run_state(vars(args), facts=_facts(args, index=index, base=base))
    if checkpoint_path is not None:
        _check_checkpoint(checkpoint_path, args=args, controlnet=controlnet)
        check_can_go_on(read_run_state(checkpoint_path), state)
    rule = sample_rule(args, base=base)
    moments_cache = open_moments_cache(args, base=base, index=index)
    position = ResumePosition()
    unreadable = UnreadablePictures(len(index), known=unreadable_rows, is_error=args.strict_data)
    datamodule = InpaintingDataModule(
        index,
        tokenizer=base.tokenizer,
        rule=rule,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        val_split=args.val_split,
        accumulate_grad_batches=args.accumulate_grad_batches,
        overfit_batches=args.overfit_batches,
        position=position,
        moments_cache=moments_cache,
        unreadable=unreadable,
    )
    record = _describe_weights(args, base=base)
    _count_steps(args, datamodule=datamodule, world_size=least_world_size(args))
    before = read_run_state(checkpoint_path) if checkpoint_path is not None else {}
    run_dir, run_json = _open_run_dir(args, record=record, checkpoint_path=checkpoint_path)
    global_step = None
    if checkpoint_path is not None:
        global_step = read_checkpoint(checkpoint_path).get("global_step")
        _say_how_it_goes_on(args, checkpoint_path, step=global_step, before=before, now=state)
    trainer = build_trainer(
        args,
        run_dir=run_dir,
        datamodule=datamodule,
        position=position,
        keeper=KeepRunFolder(run_dir, run_json=run_json, run_state=state),
        start={
            "base": state["facts"]["base_unet_sha256"],
            "data": state["facts"]["data"],
            "checkpoint": checkpoint_path and "/".join(checkpoint_path.absolute().parts[-3:]),
            "step": global_step,
        },
        purge_step=None if global_step is None else global_step + 1,
    )
    world_size = trainer.num_devices * trainer.num_nodes
    steps_per_epoch = _count_steps(args, datamodule=datamodule, world_size=world_size)
    num_steps = args.num_epochs * steps_per_epoch
    num_steps = min(args.max_steps, num_steps) if args.max_steps > 0 else num_steps
    if args.lr_warmup_steps >= num_steps and args.lr_scheduler != "constant":
        logger.warning(
            "warning: --lr_warmup_steps %d isn't over before the run's %d steps are: the learning "
            "rate never gets to --learning_rate", args.lr_warmup_steps, num_steps,
        )  # fmt: skip
    module = InpaintingControlNet(
        base=base,
        controlnet=controlnet,
        num_training_steps=num_steps,
        learning_rate=args.learning_rate,
        adam_weight_decay=args.adam_weight_decay,
        lr_scheduler=args.lr_scheduler,
        lr_warmup_steps=args.lr_warmup_steps,
        snr_gamma=args.snr_gamma,
        ema_decay=args.ema_decay,
        precision=args.precision,
        gradient_checkpointing=args.gradient_checkpointing,
        use_8bit_adam=args.use_8bit_adam,
        compile_mode=args.compile,
        moments_cache=moments_cache,
    )
    logger.info(
        "%d pictures train, %d validate; %d optimizer steps per epoch; "
        "base %s at %d px; %s on %d x %s",
        len(datamodule.train_set), len(datamodule.val_set), steps_per_epoch, record.base,
        args.image_size, args.precision, world_size, args.accelerator,
    )  # fmt: skip
    if moments_cache is not None:
        num_slots = len(datamodule.train_set) * len(rule.views) + len(datamodule.val_set)
        describe_moments_cache(moments_cache, num_slots=num_slots)
    logger.info("run folder: %s", run_dir)
    return Run(args, trainer, module, datamodule, record, run_dir, checkpoint_path)


def sample_rule(args: argparse.Namespace, *, base: Base) -> SampleRule:
    """Return what the flags say of a sample."""
    return SampleRule(
        image_size=args.image_size,
        latent_shape=_latent_shape(args, base=base),
        num_train_timesteps=base.noise_scheduler.config["num_train_timesteps"],
        mask_types=args.mask_types,
        mask_area_range=tuple(args.mask_area_range),
        empty_prompt_prob=args.empty_prompt_prob,
        num_crops=args.num_crops,
        seed=args.seed,
    )


def _latent_shape(args: argparse.Namespace, *, base: Base) -> tuple[int, int, int]:
    side = args.image_size // base.stride
    return base.vae.config["latent_channels"], side, side


def open_moments_cache(
    args: argparse.Namespace, *, base: Base, index: CocoIndex
) -> MomentsCache | None:
    """Return the cache that --cache_latents names; None where it is off.

    Under `auto` half of the disk that would be free without it stays free. A disk without room
    changes no bit of a run, so that it can be resumed beside a full disk: a miss is rounded too.
    """
    if args.cache_latents == "off":
        return None
    is_auto = args.cache_latents == "auto"
    folder = cache_dir() / "latents" if is_auto else Path(args.cache_latents)
    channels, *sides = _latent_shape(args, base=base)
    cache = MomentsCache(
        folder / cache_key(
            image_dir=index.image_dir,
            encoder=hash_encoder(base.vae),
            dtype=FROZEN_DTYPES[args.precision][1],
            device_type=args.accelerator,
            image_size=args.image_size,
        ),
        image_ids=index.image_ids,
        moments_shape=(2 * channels, sides[0], sides[1]),
    )  # fmt: skip
    if is_auto:
        cache.min_free_bytes = (free_bytes(folder) + cache.stored_bytes()) // 2
    return cache


def describe_moments_cache(cache: MomentsCache, *, num_slots: int) -> None:
    """Say what the cache takes of the disk, and whether it has room."""
    full, stored = cache.full_bytes(num_slots=num_slots), cache.stored_bytes()
    logger.info(
        "latents: %.2f GB when all are kept, %.2f GB are there: %s",
        full / 1e9, stored / 1e9, cache.folder,
    )  # fmt: skip
    room = free_bytes(cache.folder) - cache.min_free_bytes
    if full - stored > room and is_first_process():
        logger.warning(
            "warning: %.2f GB of latents are still to be kept, and the disk has room for %.2f GB: "
            "the others are encoded in each epoch. Name a larger disk: --cache_latents DIR",
            (full - stored) / 1e9, max(room, 0) / 1e9,
        )  # fmt: skip


def _count_steps(
    args: argparse.Namespace, *, datamodule: InpaintingDataModule, world_size: int
) -> int:
    """Return the optimizer steps of an epoch; what is left of an accumulation is a step too.

    Raises:
        ValueError: an epoch has no step.
    """
    num_batches = len(datamodule.train_sampler(rank=0, world_size=world_size))
    limit = args.limit_train_batches
    if isinstance(limit, int):
        num_batches = min(num_batches, limit)
    elif limit is not None and int(num_batches * limit) == 0:
        raise ValueError(
            f"--limit_train_batches must leave at least one of the {num_batches} batches of an "
            f"epoch, got the share {limit}. Name a number of batches: 1."
        )
    elif limit is not None:
        num_batches = int(num_batches * limit)
    return math.ceil(num_batches / args.accumulate_grad_batches)


def _check_checkpoint(
    checkpoint_path: Path, *, args: argparse.Namespace, controlnet: ControlNetModel
) -> None:
    """Refuse a checkpoint of another base, or without the average that is to go on."""
    checkpoint = read_checkpoint(checkpoint_path)
    if not checkpoint:  # DeepSpeed's folder: it is read by DeepSpeed alone
        check_deepspeed_shape(
            checkpoint_path, strategy=args.strategy, world_size=least_world_size(args)
        )
        return
    weights = {
        name.removeprefix("controlnet."): tensor
        for name, tensor in checkpoint["state_dict"].items()
    }
    mismatch = describe_mismatch(controlnet.state_dict(), weights)
    if mismatch:
        raise ValueError(
            f"{checkpoint_path} must be a checkpoint of a run with this base, got {mismatch}. "
            "Name the base that it was trained with: --pretrained_model_name_or_path."
        )
    if args.ema_decay and "average" not in checkpoint:
        raise ValueError(
            f"--ema_decay needs a checkpoint with an average, got {checkpoint_path} without. "
            "Resume without --ema_decay, or start anew with --controlnet_weights."
        )


def _facts(args: argparse.Namespace, *, index: CocoIndex, base: Base) -> dict[str, Any]:
    """Return what decides a run's bits beside its flags: see inpainting.changes."""
    return {
        "base": base.name,
        "base_unet_sha256": base_hash(base.unet),
        "data": index.fingerprint(),
        "latents": "unrounded" if args.cache_latents == "off" else "rounded",
        "processes": least_world_size(args),
        "device": name_device(args),
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "decoder": f"Pillow {PIL.__version__}, libjpeg {features.version('jpg')}",
    }


def name_device(args: argparse.Namespace) -> str:
    """Name what computes; another one adds in another order."""
    if args.accelerator == "gpu":
        first = args.devices[0] if isinstance(args.devices, list) else 0
        return torch.cuda.get_device_name(first)
    if args.accelerator == "cpu":  # sums are split between vector lanes and threads
        return f"{torch.backends.cpu.get_cpu_capability()} x {torch.get_num_threads()}"
    return args.accelerator


def _say_how_it_goes_on(
    args: argparse.Namespace,
    checkpoint_path: Path,
    *,
    step: int | None,
    before: dict[str, Any],
    now: dict[str, Any],
) -> None:
    """Say where a resumed run begins, and everything that isn't as it was."""
    logger.info("resuming from %s%s", checkpoint_path, "" if step is None else f" at step {step}")
    if run_dir_of(checkpoint_path) is None:
        logger.info("the checkpoint isn't in a run folder: going on in a new one")
    if not before["flags"]:
        logger.info("the checkpoint doesn't say with which flags it was written: compare them")
    flags = {**_portable_arguments(args), **now["flags"]}
    changes = list_changes(before, {**now, "flags": flags})
    for change in changes:
        logger.info("changed: %s", change)
    if any(change.effect == CHANGES_BITS for change in changes):
        logger.info("it goes on with the next sample, but not to the same bits")
    elif args.accelerator == "gpu" and not args.deterministic:
        logger.info("it goes on with the next sample; the last bits are the GPU's: --deterministic")


def _describe_weights(args: argparse.Namespace, *, base: Base) -> InpaintingRecord:
    """Record what somebody must know to use the weights; no local path is in it."""
    is_hub_id = not Path(args.pretrained_model_name_or_path).exists()
    return InpaintingRecord(
        image_size=args.image_size,
        vae_stride=base.stride,
        prediction_type=base.prediction_type,
        base="demo" if args.uses_demo_base else base.name,
        base_unet_sha256=None if is_hub_id else base_hash(base.unet),
        is_average=args.ema_decay is not None,
        global_step=0,
    )


def _open_run_dir(
    args: argparse.Namespace, *, record: InpaintingRecord, checkpoint_path: Path | None
) -> tuple[Path, str]:
    """Return the run's folder and the text of its run.json.

    A resumed run goes on in its own folder; a checkpoint that was moved starts a new one.
    """
    if not is_first_process():
        return Path(args.output_dir) / "not_the_first_process", ""
    own_dir = None if checkpoint_path is None else run_dir_of(checkpoint_path)
    run_dir = own_dir or new_run_dir(Path(args.output_dir))
    if own_dir is None:
        lock_run_dir(run_dir)
    logging.getLogger().addHandler(RunLog(run_dir))
    origin = checkpoint_path if own_dir is None else None
    run_json = write_run_json(
        run_dir, arguments=_portable_arguments(args), record=asdict(record), origin=origin
    )
    if origin is not None:
        adopt_checkpoint(origin, run_dir=run_dir)
    return run_dir, run_json


def _portable_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the resolved flags with local paths made absolute, for whoever finds the folder."""
    arguments = vars(args).copy()
    if args.cache_latents not in ("auto", "off"):
        arguments["cache_latents"] = str(Path(args.cache_latents).resolve())
    for name in ("image_dir", "ann_file", "caption_file", "controlnet_weights", "base_config",
                 "pretrained_model_name_or_path", "output_dir"):  # fmt: skip
        value = arguments[name]
        if value is not None and Path(value).exists():
            arguments[name] = str(Path(value).resolve())
    return arguments
