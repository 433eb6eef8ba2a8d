"""The mathematics of the objective: what goes in, what is asked for, how a timestep counts.

The noise schedule itself is diffusers' (DDPMScheduler.add_noise and get_velocity).
"""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

HOLE_VALUE = -1.0


def normalize_image(image: Tensor) -> Tensor:
    """Turn pictures into what the VAE reads.

    Args:
        image: (B, 3, H, W) uint8 [0, 255].

    Returns:
        (B, 3, H, W) float32 [-1, 1].
    """
    return image.float() / 127.5 - 1.0


def make_conditioning(image: Tensor, mask: Tensor) -> Tensor:
    """Build what the ControlNet sees: the picture, marked where it is missing.

    A value outside [0, 1] can't be mistaken for black. Source: control_v11p_sd15_inpaint.

    Args:
        image: (B, 3, H, W) uint8 [0, 255].
        mask: (B, 1, H, W) uint8, 1 = hole.

    Returns:
        (B, 3, H, W) float32: RGB in [0, 1], every channel -1 in the hole.
    """
    return (image.float() / 255.0).masked_fill(mask.bool(), HOLE_VALUE)


def prediction_target(
    scheduler: DDPMScheduler, *, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Return what the UNet is asked to predict, (B, C, h, w) float32.

    Epsilon: the noise (Ho et al. 2020, equation 14). v: alpha * noise - sigma * latents
    (Salimans and Ho 2022, section 4).
    """
    if scheduler.config["prediction_type"] == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[arg-type]
    return noise


def min_snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, *, snr_gamma: float) -> Tensor:
    """Return each sample's weight in the loss, (B,) float32.

    min(snr, gamma) / snr for epsilon and min(snr, gamma) / (snr + 1) for v: easy, nearly
    noiseless timesteps no longer dominate. Source: Hang et al. 2023, section 3.4.

    Args:
        scheduler: the noise schedule, and its prediction type.
        timesteps: (B,) int64.
        snr_gamma: the cap, > 0; the paper's value is 5.
    """
    snr = compute_snr(scheduler, timesteps)
    divisor = snr + 1 if scheduler.config["prediction_type"] == "v_prediction" else snr
    return torch.clamp(snr, max=snr_gamma) / divisor
