"""Small real parts for tests: a base, a ControlNet, a batch, a COCO folder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from diffusers import ControlNetModel
from transformers import CLIPTokenizer

from data import CocoInpaintingDataset, Sample, SampleRule
from demo.defaults import Scenes
from demo.random_base import write_random_base
from demo.scenes import write_scenes
from inpainting.coco import CocoIndex
from inpainting.latents import MomentsCache
from inpainting.unreadable import UnreadablePictures
from lightning_module import InpaintingControlNet
from model import Base, build_controlnet, load_base

SIZE = 64
NUM_SCENES = 12


@cache
def base_folder(*, prediction_type: str = "epsilon", stride: int = 8) -> Path:
    """Write a base once for the whole test run."""
    return write_random_base(
        mkdtemp(prefix="base-"), prediction_type=prediction_type, stride=stride
    )


@cache
def coco_folder() -> Path:
    """Draw a COCO folder once for the whole test run."""
    folder = Path(mkdtemp(prefix="scenes-"))
    write_scenes(folder, num_scenes=NUM_SCENES, size=SIZE, seed=7)
    return folder


def coco_index() -> CocoIndex:
    """Return the index of `coco_folder`."""
    folder = coco_folder()
    scenes = Scenes.in_folder(folder)
    return CocoIndex.from_annotations(
        scenes.image_dir, ann_file=scenes.ann_file, caption_file=scenes.caption_file,
        cache_dir=folder / "cache",
    )  # fmt: skip


def base(*, prediction_type: str = "epsilon", stride: int = 8) -> Base:
    """Load a base."""
    folder = base_folder(prediction_type=prediction_type, stride=stride)
    return load_base(str(folder), prediction_type=prediction_type)


def controlnet(base: Base, *, zero_convolutions_at: float = 0.0) -> ControlNetModel:
    """Build a ControlNet; its zero convolutions may start elsewhere, as after some training."""
    torch.manual_seed(0)
    network = build_controlnet(base.unet, stride=base.stride)
    if zero_convolutions_at:
        for convolution in (*network.controlnet_down_blocks, network.controlnet_mid_block):
            torch.nn.init.normal_(convolution.weight, std=zero_convolutions_at)
    return network


def module(
    base: Base,
    network: ControlNetModel,
    *,
    snr_gamma: float | None = None,
    ema_decay: float | None = None,
    learning_rate: float = 1e-3,
    precision: str = "32",
    gradient_checkpointing: bool = False,
    use_8bit_adam: bool = False,
    compile_mode: str = "off",
    moments_cache: MomentsCache | None = None,
) -> InpaintingControlNet:
    """Build the LightningModule with plain settings."""
    return InpaintingControlNet(
        base=base,
        controlnet=copy.deepcopy(network),
        num_training_steps=100,
        learning_rate=learning_rate,
        adam_weight_decay=1e-2,
        lr_scheduler="constant",
        lr_warmup_steps=0,
        snr_gamma=snr_gamma,
        ema_decay=ema_decay,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        use_8bit_adam=use_8bit_adam,
        compile_mode=compile_mode,
        moments_cache=moments_cache,
    )


def rule(*, seed: int = 42, num_crops: int = 1) -> SampleRule:
    """Return what samples of a tiny base with stride 8 look like."""
    return SampleRule(
        image_size=SIZE,
        latent_shape=(4, SIZE // 8, SIZE // 8),
        num_train_timesteps=1000,
        mask_types={"irregular": 0.4, "rectangle": 0.2, "object": 0.4},
        mask_area_range=(0.1, 0.3),
        empty_prompt_prob=0.5,
        num_crops=num_crops,
        seed=seed,
    )


@cache
def tokenizer() -> CLIPTokenizer:
    """Load a base's tokenizer."""
    return CLIPTokenizer.from_pretrained(base_folder() / "tokenizer")


def dataset(
    index: CocoIndex,
    rule: SampleRule,
    *,
    rows: Sequence[int] | None = None,
    is_training: bool,
    moments_cache: MomentsCache | None = None,
    is_strict: bool = False,
) -> CocoInpaintingDataset:
    """Build a dataset over some rows of an index, or all of them."""
    return CocoInpaintingDataset(
        index,
        rows=range(len(index)) if rows is None else rows,
        tokenizer=tokenizer(),
        rule=rule,
        is_training=is_training,
        moments_cache=moments_cache,
        unreadable=UnreadablePictures(len(index), is_error=is_strict),
    )


def batch(base: Base, *, seed: int = 0, batch_size: int = 2) -> Sample:
    """Draw a batch that fulfils the Sample contract."""
    rng = np.random.default_rng(seed)
    side = SIZE // base.stride
    noise = rng.standard_normal((2, batch_size, 4, side, side), dtype=np.float32)
    mask = np.zeros((batch_size, 1, SIZE, SIZE), np.uint8)
    mask[..., 16:40, 8:48] = 1
    return Sample(
        image=torch.from_numpy(rng.integers(0, 256, (batch_size, 3, SIZE, SIZE), dtype=np.uint8)),
        mask=torch.from_numpy(mask),
        input_ids=torch.from_numpy(rng.integers(0, 500, (batch_size, 77))),
        timestep=torch.from_numpy(rng.integers(0, 1000, batch_size)),
        noise=torch.from_numpy(noise[0]),
        posterior_noise=torch.from_numpy(noise[1]),
        image_id=torch.arange(batch_size),
        prompt=["words"] * batch_size,  # type: ignore[typeddict-item]
    )
