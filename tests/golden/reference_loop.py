"""A plain training loop in the manner of diffusers' example: nothing of the project is in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel


def train(
    *,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scheduler: DDPMScheduler,
    controlnet: ControlNetModel,
    batches: list[dict],
    learning_rate: float,
    snr_gamma: float | None = None,
) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Train on the batches in turn; return each step's loss and (clipped) gradients."""
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=learning_rate, weight_decay=1e-2)
    losses, gradients = [], []
    for batch in batches:
        pixels = batch["image"] / 255 * 2 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
            latents = posterior.mean + torch.exp(0.5 * posterior.logvar) * batch["posterior_noise"]
            latents = latents * vae.config.scaling_factor
            hidden = text_encoder(batch["input_ids"])[0]
        control = batch["image"] / 255
        control = control * (1 - batch["mask"]) - batch["mask"] * torch.ones_like(control)
        noise, timesteps = batch["noise"], batch["timestep"]
        noisy = scheduler.add_noise(latents, noise, timesteps)
        down, mid = controlnet(
            noisy,
            timesteps,
            encoder_hidden_states=hidden,
            controlnet_cond=control,
            return_dict=False,
        )
        prediction = unet(
            noisy,
            timesteps,
            encoder_hidden_states=hidden,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
        if scheduler.config.prediction_type == "epsilon":
            target = noise
        else:
            target = scheduler.get_velocity(latents, noise, timesteps)
        if snr_gamma is None:
            loss = F.mse_loss(prediction.float(), target.float(), reduction="mean")
        else:
            alpha = scheduler.alphas_cumprod[timesteps]
            snr = alpha / (1 - alpha)
            weights = torch.minimum(snr, torch.full_like(snr, snr_gamma))
            weights /= snr if scheduler.config.prediction_type == "epsilon" else snr + 1
            per_pixel = F.mse_loss(prediction.float(), target.float(), reduction="none")
            loss = (per_pixel.mean(dim=list(range(1, 4))) * weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
        gradients.append({n: p.grad.clone() for n, p in controlnet.named_parameters()})
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients
