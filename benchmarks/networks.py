"""The networks that are measured: random weights, in three sizes.

`tiny` runs in seconds, for CI; `small` has 64-256 channels, for a CPU, in heads of 64 as Stable
Diffusion 2.1; `sd15` is Stable Diffusion 1.5's own configuration.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from data import Sample
from demo.defaults import BASE_DIR
from demo.random_base import PIPELINE_INDEX, build_scheduler, write_json
from model import Base

VAE_BLOCKS = 4
STRIDE = 2 ** (VAE_BLOCKS - 1)
LATENT_CHANNELS = 4
NUM_TOKENS = 77


@dataclass(frozen=True)
class Size:
    """How large the networks are.

    Attributes:
        unet_channels, unet_layers: of its blocks; all but the last have attention.
        vae_channels, vae_layers: likewise.
        text_width, text_layers, text_heads, vocabulary: of the text encoder.
        attention_heads: of the UNet: in all blocks, or block by block.
        norm_groups: of the group norms.
        image_size: pixels, unless another one is named.
    """

    unet_channels: tuple[int, ...]
    unet_layers: int
    vae_channels: tuple[int, ...]
    vae_layers: int
    text_width: int
    text_layers: int
    text_heads: int
    vocabulary: int
    attention_heads: int | tuple[int, ...]
    norm_groups: int
    image_size: int


SIZES = {
    "tiny": Size((16, 32), 1, (8, 16, 16, 16), 1, 32, 2, 4, 600, 4, 8, 64),
    "small": Size((64, 128, 256, 256), 1, (32, 64, 128, 128), 2, 256, 4, 4, 49408,
                  (1, 2, 4, 4), 32, 256),
    "sd15": Size((320, 640, 1280, 1280), 2, (128, 256, 512, 512), 2, 768, 12, 12, 49408, 8, 32,
                 512),
}  # fmt: skip


def build_base(size: Size, *, seed: int = 0) -> Base:
    """Build a base of random weights, frozen, in eval mode, float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = (_build_vae(size), _build_unet(size), _build_text_encoder(size))
    for part in parts:
        part.requires_grad_(False).eval()
    vae, unet, text_encoder = parts
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    nobody: Any = None  # a step asks for neither tokenizer nor the base's files
    return Base(vae, unet, text_encoder, nobody, scheduler, nobody)


def write_base(folder: Path, size: Size, *, image_size: int) -> Path:
    """Write a base of random weights as a diffusers folder.

    The tokenizer is the demo's. The text encoder gets as many entries as that one has, not the
    size's: a base where the two differ is refused, and looking an entry up costs nothing.

    Args:
        folder: where to; made when missing.
        size: of the networks.
        image_size: pixels, what the UNet is declared for.

    Returns:
        The folder.
    """
    tokenizer = shutil.copytree(BASE_DIR / "tokenizer", folder / "tokenizer")
    vocabulary = len(json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8")))
    base = build_base(replace(size, vocabulary=vocabulary))
    base.unet.register_to_config(sample_size=image_size // STRIDE)
    base.vae.save_pretrained(folder / "vae")
    base.unet.save_pretrained(folder / "unet")
    base.text_encoder.save_pretrained(folder / "text_encoder")
    build_scheduler("epsilon").save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", PIPELINE_INDEX)
    return folder


def start_after_zero(controlnet: ControlNetModel, *, std: float) -> None:
    """Draw the convolutions that start at zero, as if it had been trained for a while.

    At zero no gradient gets further than to them, and what the input does stays hidden.
    """
    outputs = (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block)
    for convolution in (controlnet.controlnet_cond_embedding.conv_out, *outputs):
        torch.nn.init.normal_(convolution.weight, std=std)  # type: ignore[arg-type]


def _build_vae(size: Size) -> AutoencoderKL:
    arguments: dict[str, Any] = {
        "block_out_channels": size.vae_channels,
        "down_block_types": ("DownEncoderBlock2D",) * VAE_BLOCKS,
        "up_block_types": ("UpDecoderBlock2D",) * VAE_BLOCKS,
        "layers_per_block": size.vae_layers,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": min(size.norm_groups, *size.vae_channels),
    }
    return AutoencoderKL(**arguments)


def _build_unet(size: Size) -> UNet2DConditionModel:
    num_attending = len(size.unet_channels) - 1
    arguments: dict[str, Any] = {
        "block_out_channels": size.unet_channels,
        "down_block_types": ("CrossAttnDownBlock2D",) * num_attending + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * num_attending,
        "layers_per_block": size.unet_layers,
        "attention_head_dim": size.attention_heads,  # diffusers' name for the number of heads
        "cross_attention_dim": size.text_width,
        "norm_num_groups": size.norm_groups,
    }
    return UNet2DConditionModel(**arguments)


def _build_text_encoder(size: Size) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.text_width,
            intermediate_size=4 * size.text_width,
            projection_dim=size.text_width,
            num_hidden_layers=size.text_layers,
            num_attention_heads=size.text_heads,
            max_position_embeddings=NUM_TOKENS,
            bos_token_id=size.vocabulary - 2,
            eos_token_id=size.vocabulary - 1,
            pad_token_id=size.vocabulary - 1,
        )
    )


def draw_batch(size: Size, *, image_size: int, batch_size: int, seed: int) -> Sample:
    """Draw a batch that fulfils the Sample contract, its pictures noise."""
    rng = np.random.default_rng(seed)
    side = image_size // STRIDE
    shape = (2, batch_size, LATENT_CHANNELS, side, side)
    noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    mask = torch.zeros(batch_size, 1, image_size, image_size, dtype=torch.uint8)
    hole = slice(image_size // 4, image_size // 2)
    mask[..., hole, hole] = 1
    image = rng.integers(0, 256, (batch_size, 3, image_size, image_size), dtype=np.uint8)
    return Sample(
        image=torch.from_numpy(image),
        mask=mask,
        input_ids=torch.from_numpy(rng.integers(0, size.vocabulary, (batch_size, NUM_TOKENS))),
        timestep=torch.from_numpy(rng.integers(0, 1000, batch_size)),
        noise=noise[0],
        posterior_noise=noise[1],
        image_id=torch.arange(batch_size),
        prompt=cast(str, ["words"] * batch_size),
    )
