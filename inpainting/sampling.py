"""Filling the hole of one picture with diffusers' inpaint pipeline, every known pixel kept.

What diffusers' pipeline would get wrong is settled here, around it: the picture is never stretched
(the short side is brought to the working size, the rest padded by reflection), a hole thinner than
a latent cell still counts (max-pooled to cells), what lies under the hole is replaced before the
VAE sees it, and only the fill returns to the picture. Terms are those of inpainting/holes.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionControlNetInpaintPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from inpainting.devices import outside_autocast
from inpainting.diffusion import make_conditioning
from inpainting.holes import (
    WorkingArea,
    blend,
    cover_cells,
    fade_mask,
    fill_hole,
    from_working,
    mask_to_working,
    meet_edge,
    to_working,
    working_area,
)

# The command's own copy of these names (it may not import torch to answer --help) is tested.
SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "unipc": UniPCMultistepScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
}
# Raise it when the same weights and seed fill a hole otherwise: measures of both aren't mixed.
FILL_VERSION = 2
# Pixels of context around a hole that is cropped to, at least; half the hole's longer side if more.
MIN_CONTEXT_PX = 32


class InpaintPipeline(StableDiffusionControlNetInpaintPipeline):
    """diffusers' pipeline with the VAE run in its own dtype, out of autocast.

    Each sample draws the picture's latents from its own generator, where diffusers lets all of them
    share the first one's draw.
    """

    def _encode_vae_image(self, image: Tensor, generator: list[torch.Generator]) -> Tensor:  # type: ignore[override]
        with outside_autocast(image.device):
            posterior = self.vae.encode(image.to(self.vae.dtype)).latent_dist  # type: ignore[union-attr]
        latents = torch.cat([posterior.sample(one) for one in generator])
        return (latents * self.vae.config["scaling_factor"]).to(image.dtype)


def make_scheduler(
    name: str, noise_scheduler: DDPMScheduler
) -> (
    DDPMScheduler
    | DDIMScheduler
    | UniPCMultistepScheduler
    | DPMSolverMultistepScheduler
    | EulerAncestralDiscreteScheduler
):
    """Build a sampler for the training schedule and its prediction type.

    Its steps are spaced from the last timestep downwards ("trailing"): a fill starts from pure
    noise, which is what the networks know at that timestep and not at an earlier one.
    Source: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
    section 3.3.

    Args:
        name: a key of SCHEDULERS.
        noise_scheduler: the schedule that the base was trained with; it isn't touched.

    Raises:
        ValueError: no such sampler.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}.")
    overrides: dict[str, Any] = {"timestep_spacing": "trailing"}
    if name in ("ddpm", "ddim"):  # their default of clipping to [-1, 1] is meant for pixels
        overrides["clip_sample"] = False
    return SCHEDULERS[name].from_config(noise_scheduler.config, **overrides)


def make_pipeline(
    *,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    controlnet: ControlNetModel,
    scheduler: Any,
) -> InpaintPipeline:
    """Put networks that are in memory into a pipeline; nothing is copied, moved or cast.

    The networks have to be on one device. The progress bar is off.

    Args:
        vae: in whatever dtype it decodes well in.
        unet: 4 input channels.
        text_encoder: its dtype is that of the latents between the steps: float32 is best.
        tokenizer: of the text encoder.
        controlnet: may differ from the UNet in dtype: then autocast reconciles them.
        scheduler: from `make_scheduler`; its state belongs to the pipeline.
    """
    pipeline = InpaintPipeline(
        vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, controlnet=controlnet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_steps(*, num_inference_steps: int, strength: float) -> None:
    """Refuse settings with which no step would be taken.

    Raises:
        ValueError: strength outside (0, 1], or steps x strength below 1.
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(
            f"--strength must be in (0, 1], got {strength:g}. 1 fills from pure noise."
        )
    # int() as in diffusers' get_timesteps: with 0 steps it fails with an index error.
    if int(num_inference_steps * strength) < 1:
        raise ValueError(
            f"--num_inference_steps x --strength must be at least 1, got {num_inference_steps} x "
            f"{strength:g}. Take at least {math.ceil(1 / strength)} steps."
        )


def inpaint(
    pipeline: InpaintPipeline,
    *,
    image: np.ndarray,
    mask: np.ndarray,
    prompt: str,
    negative_prompt: str,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    conditioning_scale: float,
    strength: float,
    image_size: int,
    crop_to_mask: bool,
    mask_blur: int,
) -> list[np.ndarray]:
    """Fill the hole of one picture, once for each seed, as one batch.

    At strength 1 the results are a function of the known pixels alone. The random numbers are drawn
    on the CPU, so that a seed means the same on every device. A result's last bits depend on how
    many are drawn together, as every batched kernel's do.

    Args:
        pipeline: from `make_pipeline`.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, 1 = hole to fill.
        prompt: what to fill it with.
        negative_prompt: what not; without effect at guidance_scale <= 1.
        seeds: one for each result, >= 0; equal arguments and seeds give equal bits.
        num_inference_steps: steps at strength 1.
        guidance_scale: classifier-free guidance; <= 1 turns it off.
        conditioning_scale: weight of the ControlNet's residuals; 0 leaves the base alone.
        strength: in (0, 1]; below 1 the picture under the hole is started from.
        image_size: working pixels of the crop's short side.
        crop_to_mask: work on the hole and its surroundings instead of the whole picture.
        mask_blur: source pixels outside the hole over which the fill fades out, >= 0.

    Returns:
        (H, W, 3) uint8 each: bit-identical to the image further than mask_blur from the hole.

    Raises:
        FloatingPointError: the networks overflowed in their dtype.
    """
    working = make_working(
        pipeline,
        image=image,
        mask=mask,
        image_size=image_size,
        crop_to_mask=crop_to_mask,
        context_px=max(MIN_CONTEXT_PX, mask_blur),
        is_neutral=strength == 1.0,
    )
    fills = draw_fills(
        pipeline,
        working,
        prompt=prompt,
        negative_prompt=negative_prompt,
        seeds=seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        conditioning_scale=conditioning_scale,
        strength=strength,
    )
    paste_one = partial(paste, image=image, mask=mask, working=working, mask_blur=mask_blur)
    return [paste_one(fill) for fill in fills]


@dataclass(frozen=True)
class Working:
    """A picture and its hole as the networks get them.

    Attributes:
        area: which part of the picture it is, and how it was brought to its size.
        image: (h, w, 3) uint8; what lies under the hole is replaced or, if that was asked for, not.
        mask: (h, w) uint8, 1 = hole.
        cell_px: side of a latent cell.
    """

    area: WorkingArea
    image: np.ndarray
    mask: np.ndarray
    cell_px: int


def make_working(
    pipeline: InpaintPipeline,
    *,
    image: np.ndarray,
    mask: np.ndarray,
    image_size: int,
    crop_to_mask: bool = False,
    context_px: int = MIN_CONTEXT_PX,
    is_neutral: bool = True,
) -> Working:
    """Cut and resize what the networks get.

    Args:
        pipeline: from `make_pipeline`.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, 1 = hole.
        image_size: working pixels of the crop's short side.
        crop_to_mask: work on the hole and its surroundings instead of the whole picture.
        context_px: of the surroundings, at least.
        is_neutral: fill the hole from its surroundings first, so that nothing under it is seen.
    """
    area = working_area(
        mask,
        image_size=image_size,
        multiple=pipeline.vae_scale_factor * unet_stride(pipeline.unet),
        crop_to_mask=crop_to_mask,
        context_px=context_px,
    )
    crop, crop_mask = image[area.rows, area.columns], mask[area.rows, area.columns]
    start = fill_hole(crop, mask=crop_mask) if is_neutral else crop
    return Working(
        area=area,
        image=to_working(start, area=area),
        mask=mask_to_working(crop_mask, area=area),
        cell_px=pipeline.vae_scale_factor,
    )


@torch.no_grad()
def draw_fills(
    pipeline: InpaintPipeline,
    working: Working,
    *,
    prompt: str,
    negative_prompt: str,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    conditioning_scale: float,
    strength: float,
) -> list[np.ndarray]:
    """Let the networks draw, once for each seed, as one batch; arguments as those of `inpaint`.

    Returns:
        (h, w, 3) uint8 each, the whole working picture: about the known pixels, and the fill.

    Raises:
        FloatingPointError: the networks overflowed in their dtype.
    """
    pixels = torch.from_numpy(working.image).permute(2, 0, 1)[None]
    hole = torch.from_numpy(working.mask)[None, None]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with _reconcile_dtypes(pipeline):
        latents = pipeline(
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=pixels.float() / 255.0,
            mask_image=cover_cells(hole, stride=pipeline.vae_scale_factor).float(),
            control_image=make_conditioning(pixels, hole),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            controlnet_conditioning_scale=float(conditioning_scale),
            strength=strength,
            num_images_per_prompt=len(seeds),
            generator=generators,
            output_type="latent",
        ).images  # type: ignore[union-attr]
    return [decode(pipeline.vae, sample[None]) for sample in latents]  # type: ignore[index]


def paste(
    fill: np.ndarray,
    *,
    image: np.ndarray,
    mask: np.ndarray,
    working: Working,
    mask_blur: int = 0,
    meets_edge: bool = True,
) -> np.ndarray:
    """Put what was drawn into the hole; outside of it, mask_blur aside, no pixel changes.

    Args:
        fill: (h, w, 3) uint8 at working size.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, 1 = hole.
        working: made of both.
        mask_blur: source pixels outside the hole over which the fill fades out.
        meets_edge: take the seam away; without effect where the fill fades out.

    Returns:
        (H, W, 3) uint8.
    """
    if meets_edge and mask_blur == 0:
        fill = meet_edge(fill, image=working.image, mask=working.mask, width_px=working.cell_px)
    area = working.area
    fade = fade_mask(mask, width_px=mask_blur)[area.rows, area.columns]
    result = image.copy()
    result[area.rows, area.columns] = blend(
        image[area.rows, area.columns], fill=from_working(fill, area=area), weight=fade
    )
    return result


def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Turn final latents (1, C, h, w) into a picture (H, W, 3) uint8.

    Raises:
        FloatingPointError: the picture isn't finite, which would be shown as black.
    """
    with outside_autocast(latents.device):
        image = vae.decode(latents.to(vae.dtype) / vae.config["scaling_factor"], return_dict=False)[
            0
        ].float()
    if not torch.isfinite(image).all():
        raise FloatingPointError(
            "the result must be finite, got NaN or infinity: the networks overflowed. "
            "Run with --precision 32, or bf16-mixed on a GPU that has it."
        )
    levels = ((image[0] + 1.0) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return levels.permute(1, 2, 0).cpu().numpy()


@contextlib.contextmanager
def _reconcile_dtypes(pipeline: InpaintPipeline) -> Iterator[None]:
    """Run a half-precision network beside float32 ones under autocast, equal ones as they are.

    What the UNet predicts is brought to float32 first: guidance multiplies its rounding, and some
    samplers would keep the latents in its dtype.
    """
    dtypes = {net.dtype for net in (pipeline.unet, pipeline.controlnet, pipeline.text_encoder)}
    if len(dtypes) == 1:
        yield
        return
    half = next(dtype for dtype in (torch.float16, torch.bfloat16) if dtype in dtypes)
    hook = pipeline.unet.register_forward_hook(lambda _, __, outputs: (outputs[0].float(),))
    try:
        with torch.autocast(pipeline.unet.device.type, dtype=half):
            yield
    finally:
        hook.remove()


def unet_stride(unet: UNet2DConditionModel) -> int:
    """Return how many cells one pixel of the UNet's deepest level covers along a side."""
    return 2 ** (len(unet.config["down_block_types"]) - 1)
