"""Stable Diffusion in one .safetensors or .ckpt file, by the names that its authors gave.

The renaming is diffusers' own; around it everything is checked: what diffusers' from_single_file
doesn't find in the file stays empty or random, and it wants a whole pipeline's configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn

from inpainting.base import BaseConfig
from inpainting.interop import read_weight_file

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."  # SD 1.x: OpenAI's CLIP, by transformers' names
OPEN_CLIP_PREFIX = "cond_stage_model.model."  # SD 2.x: OpenCLIP, by its own names


@dataclass(frozen=True)
class BaseWeights:
    """The tensors of the three networks, by the names that their classes have for them."""

    unet: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    text_encoder: Mapping[str, Tensor]


def read_single_file(path: Path, *, config: BaseConfig, text_encoder: nn.Module) -> BaseWeights:
    """Read a whole Stable Diffusion 1.x or 2.x, without running code from the file.

    Args:
        path: the .safetensors or .ckpt file.
        config: of the networks that the file is said to hold.
        text_encoder: an empty one: the names of its tensors depend on transformers' version, and
            OpenCLIP's joined projections are split by its width.

    Raises:
        ValueError: the file can't be read, or lacks one of the three networks.
    """
    content = read_weight_file(path)
    if isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    tensors = content if isinstance(content, Mapping) else {}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    is_open_clip = _holds(tensors, OPEN_CLIP_PREFIX)
    for network, prefix in (
        ("UNet", UNET_PREFIX),
        ("VAE", VAE_PREFIX),
        ("text encoder", OPEN_CLIP_PREFIX if is_open_clip else CLIP_PREFIX),
    ):
        if not _holds(tensors, prefix):
            raise ValueError(
                f"{path} must hold a whole Stable Diffusion, got no {network} ({prefix}*). "
                "Name a complete file, or a diffusers folder."
            )
    try:
        if is_open_clip:
            text_weights = convert_open_clip_checkpoint(
                text_encoder, tensors, prefix=OPEN_CLIP_PREFIX
            )
        else:
            text_weights = convert_ldm_clip_checkpoint(tensors)
        return BaseWeights(
            unet=convert_ldm_unet_checkpoint(tensors, config.unet),
            vae=convert_ldm_vae_checkpoint(tensors, config.vae),
            text_encoder=_own_names(text_weights, text_encoder),
        )
    except KeyError as error:  # some renamings ask for a bias wherever there is a weight
        raise ValueError(
            f"{path} must hold a whole Stable Diffusion, got no tensor {error.args[0]}. "
            "Fetch it again, or name a diffusers folder."
        ) from error


def _holds(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def _own_names(weights: Mapping[str, Tensor], text_encoder: nn.Module) -> dict[str, Tensor]:
    """Name a text encoder's tensors as this transformers does, without what it computes itself.

    Files from before transformers 4.31 keep position_ids, which is 0, 1, 2, ...
    """
    prefix = "text_model." if hasattr(text_encoder, "text_model") else ""
    return {
        prefix + name.removeprefix("text_model."): tensor
        for name, tensor in weights.items()
        if not name.endswith("position_ids")
    }
