"""The ControlNet and the frozen Stable Diffusion that it steers: build, load, predict noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from inpainting.attention import FittingAttention
from inpainting.base import BaseConfig, read_base_config
from inpainting.base_networks import load_networks, load_tokenizer
from inpainting.convolutions import lay_out, use_winograd
from inpainting.devices import outside_autocast
from inpainting.diffusion import normalize_image
from inpainting.interop import describe_mismatch
from inpainting.latents import round_moments

# Channels of diffusers' hint encoder; each entry after the first halves the picture once.
HINT_CHANNELS = (16, 32, 96, 256, 256, 256)
SINGLE_FILE_SD2_WIDTH = 1024
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # of diffusers' posterior
GIB = 2**30


@dataclass
class Base:
    """The frozen networks. A plain object, so that Lightning never registers or saves them.

    Attributes:
        vae: pictures to latents and back.
        unet: predicts the noise; what the ControlNet's residuals are added to.
        text_encoder: token ids (B, L) -> hidden states (B, L, D).
        tokenizer: prompt -> token ids.
        noise_scheduler: the training schedule, with the prediction type in force.
        config: where all of it came from.
    """

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    noise_scheduler: DDPMScheduler
    config: BaseConfig
    _empty_prompt: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        """Hub id or folder name."""
        return self.config.name

    @property
    def stride(self) -> int:
        """Pixels per latent along one side."""
        return self.config.stride

    @property
    def image_size(self) -> int:
        """The side in pixels that the base was trained on."""
        return self.config.image_size

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts, "epsilon" or "v_prediction", with --prediction_type applied."""
        return self.noise_scheduler.config["prediction_type"]

    def to(self, device: torch.device, *, dtype: torch.dtype, vae_dtype: torch.dtype) -> None:
        """Move the frozen networks. fp16 overflows in the VAE, hence its own dtype."""
        self.place_vae(device, dtype=vae_dtype)
        self._empty_prompt = None
        for network in (self.unet, self.text_encoder):
            nn.Module.to(network, device=device, dtype=dtype)

    def place_vae(self, device: torch.device, *, dtype: torch.dtype) -> None:
        """Let the VAE compute on a device, in a dtype."""
        nn.Module.to(self.vae, device=device, dtype=dtype)
        lay_out(self.vae)

    def move_vae(self, device: torch.device) -> None:
        """Bring the VAE to where it is needed, or away from where it isn't."""
        if self.vae.device != device:
            # Moved within a validation its weights would be fit for inference alone.
            with torch.inference_mode(False):
                nn.Module.to(self.vae, device=device)

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """Ask the VAE for the moments of its posterior.

        Args:
            image: (B, 3, H, W) float32 [-1, 1].

        Returns:
            (B, 2C, h, w) in the VAE's dtype: mean, then log-variance.
        """
        with outside_autocast(image.device):
            encoded = self.vae.encode(image.to(self.vae.dtype))
        return encoded.latent_dist.parameters  # type: ignore[union-attr]

    def encode_alone(self, image: Tensor) -> np.ndarray:
        """Encode one picture to what a MomentsCache keeps.

        Alone: a VAE's last bits depend on the batch around a picture.

        Args:
            image: (3, H, W) uint8, where the VAE is.

        Returns:
            (2C, h, w) float16, on the CPU.
        """
        return round_moments(self.encode_image(normalize_image(image[None]))[0])

    @torch.no_grad()
    def sample_latents(self, moments: Tensor, *, posterior_noise: Tensor) -> Tensor:
        """Draw latents from the VAE's posterior.

        Args:
            moments: (B, 2C, h, w), any dtype.
            posterior_noise: (B, C, h, w) float32, standard normal.

        Returns:
            (B, C, h, w) float32, scaled to about unit variance.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE))
        return (mean + std * posterior_noise) * self.vae.config["scaling_factor"]

    @torch.no_grad()
    def encode_prompt(self, input_ids: Tensor, *, is_empty: bool = False) -> Tensor:
        """Return the text encoder's hidden states, (B, L) int64 -> (B, L, D).

        Args:
            input_ids: tokenized prompts.
            is_empty: all of them are the empty prompt, which is encoded once and kept: half of a
                training's batches of one, and all where nothing is known of the pictures.
        """
        with outside_autocast(input_ids.device):
            if not is_empty:
                return self.text_encoder(input_ids)[0]
            if self._empty_prompt is None:
                self._empty_prompt = cast(Tensor, self.text_encoder(input_ids[:1])[0])
        # Copied: torch.compile would take a view without strides for another shape.
        return self._empty_prompt.repeat(len(input_ids), 1, 1)


def load_base(
    name_or_path: str,
    *,
    base_config: str | None = None,
    prediction_type: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Base:
    """Load the frozen networks in eval mode, without gradients, on the CPU.

    Args:
        name_or_path: hub id, diffusers folder, or single .safetensors/.ckpt file.
        base_config: folder or hub id of a single file's configurations and tokenizer.
        prediction_type: "auto" (the scheduler's own), "epsilon" or "v_prediction".
        dtype: dtype of UNet and text encoder; the VAE stays in float32.

    Raises:
        FileNotFoundError: something named doesn't exist.
        ValueError: the base is not an SD 1.x or 2.x, or its weights don't fit its configuration.
    """
    config = read_base_config(name_or_path, base_config=base_config)
    check_prediction_type(config, prediction_type)
    tokenizer = load_tokenizer(config)  # before the weights: it may be what is missing
    vae, unet, text_encoder = parts = load_networks(config, dtype=dtype)
    for network in parts:
        network.requires_grad_(False).eval()
    choose_kernels(vae, unet)
    if len(tokenizer) != text_encoder.config.vocab_size:
        raise ValueError(
            f"the base's tokenizer must know the text encoder's {text_encoder.config.vocab_size} "
            f"tokens, got {len(tokenizer)}. Fetch vocab.json and merges.txt of {config.name} again."
        )
    chosen = config.prediction_type if prediction_type == "auto" else prediction_type
    return Base(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        noise_scheduler=cast(
            DDPMScheduler, DDPMScheduler.from_config(config.scheduler, prediction_type=chosen)
        ),
        config=config,
    )


def choose_kernels(vae: AutoencoderKL, unet: UNet2DConditionModel) -> None:
    """Let frozen networks compute by what is fastest; it moves the last bits of the results."""
    for network in (vae, unet):
        use_winograd(network)
    lay_out(vae)
    for layer in vae.modules():
        if isinstance(layer, nn.SiLU):
            layer.inplace = True  # nothing else reads a group norm's result
    unet.set_attn_processor(FittingAttention())  # type: ignore[arg-type]


def check_prediction_type(config: BaseConfig, prediction_type: str) -> None:
    """Refuse to guess where the file can't tell: v and epsilon SD 2.x share every shape.

    Raises:
        ValueError: a 1024-wide single file with --prediction_type auto.
    """
    is_wide = config.unet["cross_attention_dim"] == SINGLE_FILE_SD2_WIDTH
    if config.single_file and is_wide and prediction_type == "auto":
        raise ValueError(
            "--prediction_type must be named for a single SD 2.x file, got auto. "
            "SD 2.1 at 768 px: v_prediction; SD 2.1 base at 512 px: epsilon."
        )


def build_controlnet(unet: UNet2DConditionModel, *, stride: int) -> ControlNetModel:
    """Copy the UNet's encoder into a trainable ControlNet whose outputs start at zero.

    The hint encoder must shrink the conditioning by the VAE's stride: one entry of
    conditioning_embedding_out_channels more than it has stride-2 steps.
    Source: Zhang et al. 2023, section 3.

    Args:
        unet: the frozen UNet, any dtype.
        stride: the VAE's stride, a power of 2.
    """
    controlnet = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=HINT_CHANNELS[: int(math.log2(stride)) + 1]
    )
    nn.Module.to(controlnet, dtype=torch.float32)
    use_winograd(controlnet)
    controlnet.set_attn_processor(FittingAttention())  # type: ignore[arg-type]
    return controlnet.train()


def load_controlnet_weights(
    controlnet: ControlNetModel, state_dict: Mapping[str, Tensor], *, source: str | Path
) -> None:
    """Load weights strictly by name and shape.

    Raises:
        ValueError: lists the differences by name.
    """
    mismatch = describe_mismatch(controlnet.state_dict(), state_dict)
    if mismatch:
        raise ValueError(
            f"{source} must hold a ControlNet for this base, got {mismatch}. "
            "Name the base that it was trained with: --pretrained_model_name_or_path."
        )
    controlnet.load_state_dict(dict(state_dict), strict=True)


def predict_noise(
    controlnet: ControlNetModel | None,
    unet: UNet2DConditionModel,
    *,
    noisy_latents: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor,
    conditioning: Tensor,
) -> Tensor:
    """Let the ControlNet steer the frozen UNet: its residuals are added to the UNet's own.

    Args:
        controlnet: the trainable copy of the encoder; None: the base predicts alone.
        unet: the frozen UNet.
        noisy_latents: (B, C, h, w).
        timesteps: (B,) int64.
        encoder_hidden_states: (B, L, D).
        conditioning: (B, 3, H, W), [0, 1] with -1 in the hole.

    Returns:
        (B, C, h, w) in the UNet's dtype: noise or v, as the base predicts.
    """
    dtype = unet.conv_in.weight.dtype  # unet.dtype walks through all modules: 2 ms each time
    down_block_res_samples, mid_block_res_sample = None, None
    if controlnet is not None:
        down_block_res_samples, mid_block_res_sample = controlnet(
            noisy_latents, timesteps, encoder_hidden_states, conditioning, return_dict=False
        )
        down_block_res_samples = [sample.to(dtype) for sample in down_block_res_samples]
        mid_block_res_sample = mid_block_res_sample.to(dtype)
    with outside_autocast(noisy_latents.device):
        return unet(
            noisy_latents.to(dtype),
            timesteps,
            encoder_hidden_states.to(dtype),
            down_block_additional_residuals=down_block_res_samples,
            mid_block_additional_residual=mid_block_res_sample,
            return_dict=False,
        )[0]


def estimate_sizes(
    config: BaseConfig, *, precision: str, has_average: bool, use_8bit_adam: bool
) -> dict[str, float]:
    """Count parameters and the memory that doesn't depend on the batch, from shapes alone.

    Returns:
        controlnet_parameters (a count), weights_gib (frozen and trained networks, gradients and
        Adam's state on one device), checkpoint_gib (one .ckpt).
    """
    with torch.device("meta"):
        unet = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(config.unet))
        vae = cast(AutoencoderKL, AutoencoderKL.from_config(config.vae))
        text_encoder = CLIPTextModel(CLIPTextConfig(**config.text_encoder))
        controlnet = build_controlnet(unet, stride=config.stride)
    count = {
        name: sum(parameter.numel() for parameter in network.parameters())
        for name, network in (
            ("unet", unet), ("vae", vae), ("text", text_encoder), ("controlnet", controlnet),
        )
    }  # fmt: skip
    frozen_bytes = {"32": 4, "bf16-mixed": 2, "16-mixed": 2}[precision]
    vae_bytes = {"32": 4, "bf16-mixed": 2, "16-mixed": 4}[precision]
    # Of each trained parameter: itself, its gradient, Adam's two moments, its average. In 8 bits
    # 256 numbers of a moment share a float32 scale.
    adam_bytes = 2 * (1 + 4 / 256) if use_8bit_adam else 2 * 4
    kept_bytes = 4 + adam_bytes + 4 * has_average
    weights = (count["unet"] + count["text"]) * frozen_bytes + count["vae"] * vae_bytes
    weights += count["controlnet"] * (kept_bytes + 4)
    return {
        "controlnet_parameters": count["controlnet"],
        "weights_gib": weights / GIB,
        "checkpoint_gib": count["controlnet"] * kept_bytes / GIB,
    }
