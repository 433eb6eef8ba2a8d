"""Filling the hole of one picture with diffusers' inpaint pipeline, every known pixel kept.

What diffusers' pipeline would get wrong is settled here, around it: the picture is never stretched
(the short side is brought to the working size, the rest padded by reflection), a hole thinner than
a latent cell still counts (max-pooled to cells), what lies under the hole is replaced before the
VAE sees it, and only the fill returns to the picture.

Terms: *source* pixels are the picture's own; the *crop* is the part that is worked on; *working*
pixels are what the networks see; a *cell* is one latent pixel, `stride` working pixels wide.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
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
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from inpainting.diffusion import make_conditioning

# The command's own copy of these names (it may not import torch to answer --help) is tested.
SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "unipc": UniPCMultistepScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
}
# Pixels of context around a hole that is cropped to, at least; half the hole's longer side if more.
MIN_CONTEXT_PX = 32
# What a hole becomes when nothing is known: mid-grey, about 0 in the VAE's range.
NEUTRAL_GREY = 128.0


class InpaintPipeline(StableDiffusionControlNetInpaintPipeline):
    """diffusers' pipeline with the VAE run in its own dtype, out of autocast.

    fp16 autocast makes Stable Diffusion's VAE overflow to NaN.
    """

    def _encode_vae_image(self, image: Tensor, generator: torch.Generator) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            latents = super()._encode_vae_image(image.to(self.vae.dtype), generator)
        return latents.to(image.dtype)


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

    Args:
        name: a key of SCHEDULERS.
        noise_scheduler: the schedule that the base was trained with; it isn't touched.

    Raises:
        ValueError: no such sampler.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {name!r}.")
    # Latents leave [-1, 1]: DDPM's and DDIM's default of clipping is meant for pixels.
    overrides = {"clip_sample": False} if name in ("ddpm", "ddim") else {}
    return SCHEDULERS[name].from_config(noise_scheduler.config, **overrides)


def make_pipeline(
    *,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    controlnet: ControlNetModel,
    scheduler: Any,  # noqa: ANN401 - diffusers' samplers share no typed base
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


@torch.no_grad()
def inpaint(
    pipeline: InpaintPipeline,
    *,
    image: np.ndarray,
    mask: np.ndarray,
    prompt: str,
    negative_prompt: str,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float,
    conditioning_scale: float,
    strength: float,
    image_size: int,
    crop_to_mask: bool,
    mask_blur: int,
) -> np.ndarray:
    """Fill the hole of one picture.

    At strength 1 the result is a function of the known pixels alone. The random numbers are drawn
    on the CPU, so that a seed means the same on every device.

    Args:
        pipeline: from `make_pipeline`.
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, 1 = hole to fill.
        prompt: what to fill it with.
        negative_prompt: what not; without effect at guidance_scale <= 1.
        seed: >= 0; equal arguments and seed give equal bits.
        num_inference_steps: steps at strength 1.
        guidance_scale: classifier-free guidance; <= 1 turns it off.
        conditioning_scale: weight of the ControlNet's residuals.
        strength: in (0, 1]; below 1 the picture under the hole is started from.
        image_size: working pixels of the crop's short side.
        crop_to_mask: work on the hole and its surroundings instead of the whole picture.
        mask_blur: source pixels outside the hole over which the fill fades out, >= 0.

    Returns:
        (H, W, 3) uint8: bit-identical to the image further than mask_blur from the hole.

    Raises:
        FloatingPointError: the networks overflowed in their dtype.
    """
    area = working_area(
        mask,
        image_size=image_size,
        multiple=pipeline.vae_scale_factor * unet_stride(pipeline.unet),
        crop_to_mask=crop_to_mask,
        context_px=max(MIN_CONTEXT_PX, mask_blur),
    )
    crop, crop_mask = image[area.rows, area.columns], mask[area.rows, area.columns]
    start = fill_hole(crop, mask=crop_mask) if strength == 1.0 else crop
    pixels = torch.from_numpy(to_working(start, area=area)).permute(2, 0, 1)[None]
    hole = torch.from_numpy(mask_to_working(crop_mask, area=area))[None, None]
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
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
        ).images  # type: ignore[union-attr]
    fill = from_working(decode(pipeline.vae, latents), area=area)  # type: ignore[arg-type]
    result = image.copy()
    fade = fade_mask(mask, width_px=mask_blur)[area.rows, area.columns]
    result[area.rows, area.columns] = blend(crop, fill=fill, weight=fade)
    return result


def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Turn final latents (1, C, h, w) into a picture (H, W, 3) uint8.

    Raises:
        FloatingPointError: the picture isn't finite, which would be shown as black.
    """
    with torch.autocast(latents.device.type, enabled=False):
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


def _reconcile_dtypes(pipeline: InpaintPipeline) -> contextlib.AbstractContextManager:
    """Run a half-precision network beside float32 ones under autocast, equal ones as they are."""
    dtypes = {net.dtype for net in (pipeline.unet, pipeline.controlnet, pipeline.text_encoder)}
    if len(dtypes) == 1:
        return contextlib.nullcontext()
    half = next(dtype for dtype in (torch.float16, torch.bfloat16) if dtype in dtypes)
    return torch.autocast(pipeline.unet.device.type, dtype=half)


def unet_stride(unet: UNet2DConditionModel) -> int:
    """Return how many cells one pixel of the UNet's deepest level covers along a side."""
    return 2 ** (len(unet.config["down_block_types"]) - 1)


# Geometry: source pixels -> working pixels -> source pixels


@dataclass(frozen=True)
class WorkingArea:
    """Which part of the picture is worked on, and at which size.

    Attributes:
        rows: of the crop, in source pixels.
        columns: of the crop, in source pixels.
        size: (width, height) of the resized crop, working pixels.
        padded_size: (width, height) with the padding at its right and bottom, working pixels.
    """

    rows: slice
    columns: slice
    size: tuple[int, int]
    padded_size: tuple[int, int]

    @property
    def crop_size(self) -> tuple[int, int]:
        """(width, height) of the crop in source pixels."""
        return self.columns.stop - self.columns.start, self.rows.stop - self.rows.start


def working_area(
    mask: np.ndarray, *, image_size: int, multiple: int, crop_to_mask: bool, context_px: int
) -> WorkingArea:
    """Decide where and at which size to work.

    Args:
        mask: (H, W) uint8 with a hole.
        image_size: working pixels of the crop's short side.
        multiple: what both padded sides have to be divisible by.
        crop_to_mask: crop to the hole with its context instead of keeping the whole picture.
        context_px: source pixels around the hole at least; half the hole's longer side if more.
    """
    rows, columns = slice(0, mask.shape[0]), slice(0, mask.shape[1])
    if crop_to_mask:
        top, bottom = _extent(mask.max(axis=1))
        left, right = _extent(mask.max(axis=0))
        context = max(context_px, math.ceil(max(bottom - top, right - left) / 2))
        rows = slice(max(0, top - context), min(mask.shape[0], bottom + context))
        columns = slice(max(0, left - context), min(mask.shape[1], right + context))
    width, height = columns.stop - columns.start, rows.stop - rows.start
    scale = image_size / min(width, height)
    size = (round(width * scale), round(height * scale))
    padded = (math.ceil(size[0] / multiple) * multiple, math.ceil(size[1] / multiple) * multiple)
    return WorkingArea(rows=rows, columns=columns, size=size, padded_size=padded)


def _extent(holes: np.ndarray) -> tuple[int, int]:
    """Return the first index that isn't 0, and one past the last."""
    indices = np.flatnonzero(holes)
    return int(indices[0]), int(indices[-1]) + 1


def to_working(crop: np.ndarray, *, area: WorkingArea) -> np.ndarray:
    """Resize and pad a crop: (h, w, 3) uint8 -> (padded height, padded width, 3) uint8."""
    resized = np.asarray(Image.fromarray(crop).resize(area.size, Image.Resampling.BICUBIC))
    return np.pad(resized, (*_padding(area), (0, 0)), mode="reflect")


def mask_to_working(mask: np.ndarray, *, area: WorkingArea) -> np.ndarray:
    """Resize and pad a crop's mask; a working pixel that holds any of the hole is hole.

    The padding mirrors the hole with the picture: a fill that isn't known yet must not be mirrored
    as something known.

    Args:
        mask: (h, w) uint8.
        area: where the crop stands.

    Returns:
        (padded height, padded width) uint8.
    """
    coverage = Image.fromarray(mask.astype(np.float32)).resize(area.size, Image.Resampling.BOX)
    return np.pad((np.asarray(coverage) > 0).astype(np.uint8), _padding(area), mode="reflect")


def from_working(image: np.ndarray, *, area: WorkingArea) -> np.ndarray:
    """Cut the padding off and resize to the crop's own size, (h, w, 3) uint8."""
    width, height = area.size
    inner = Image.fromarray(np.ascontiguousarray(image[:height, :width]))
    return np.asarray(inner.resize(area.crop_size, Image.Resampling.BICUBIC))


def _padding(area: WorkingArea) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, area.padded_size[1] - area.size[1]), (0, area.padded_size[0] - area.size[0])


# Masks


def cover_cells(mask: Tensor, *, stride: int) -> Tensor:
    """Grow a hole to the whole cells that it touches, at full resolution.

    diffusers samples one pixel per cell, which erases a hole that misses it: after this every
    pixel of a cell says the same.

    Args:
        mask: (B, 1, H, W) uint8, sides divisible by stride.
        stride: working pixels per cell.

    Returns:
        (B, 1, H, W) uint8.
    """
    cells = F.max_pool2d(mask.float(), stride)
    return F.interpolate(cells, scale_factor=stride, mode="nearest").to(mask.dtype)


def fit_mask(mask: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Bring a mask of the picture's proportions to the picture's size; thin holes survive.

    Raises:
        ValueError: the proportions differ by more than the rounding to whole pixels explains.
    """
    rows, columns = mask.shape
    if (rows, columns) == (height, width):
        return mask
    if abs(rows * width - columns * height) > max(rows, columns, height, width):
        raise ValueError(
            f"the mask must have the picture's proportions, got a mask of {columns}x{rows} for a "
            f"picture of {width}x{height}. Draw it on this picture."
        )
    coverage = Image.fromarray(mask.astype(np.float32)).resize(
        (width, height), Image.Resampling.BOX
    )
    return (np.asarray(coverage) > 0).astype(np.uint8)


def grow_mask(mask: np.ndarray, *, radius_px: int) -> np.ndarray:
    """Grow the hole by radius_px pixels to all sides, corners square. (H, W) uint8."""
    hole = torch.from_numpy(mask.astype(np.float32))[None, None]
    side = 2 * radius_px + 1
    hole = F.max_pool2d(hole, (side, 1), stride=1, padding=(radius_px, 0))
    hole = F.max_pool2d(hole, (1, side), stride=1, padding=(0, radius_px))
    return hole[0, 0].to(torch.uint8).numpy()


def fade_mask(mask: np.ndarray, *, width_px: int) -> np.ndarray:
    """Return the fill's weight: 255 in the hole, 0 further than width_px outside, a ramp between.

    It fades outside the hole only: inside, what the hole was meant to remove would shine through.

    Args:
        mask: (H, W) uint8.
        width_px: 0 = a hard edge.

    Returns:
        (H, W) uint8 [0, 255].
    """
    hole = mask * np.uint8(255)
    if width_px == 0:
        return hole
    # A box blur of radius r over a hole grown by g ramps from g - r to g + r outside of it.
    grown = grow_mask(mask, radius_px=width_px - width_px // 2)
    ramp = Image.fromarray(grown * np.uint8(255)).filter(ImageFilter.BoxBlur(width_px // 2))
    return np.maximum(hole, np.asarray(ramp))


# Pixels


def fill_hole(image: np.ndarray, *, mask: np.ndarray) -> np.ndarray:
    """Replace the hole by a smooth continuation of what is known around it.

    Neither edges nor colours come from under the hole, and none are invented: the VAE, which sees
    far, then encodes the known pixels nearly as if the hole weren't there.
    Source: pull-push, Gortler et al. 1996, "The Lumigraph", section 3.4.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) uint8, 1 = hole.

    Returns:
        (H, W, 3) uint8; known pixels as they are, mid-grey if there are none.
    """
    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    known = torch.from_numpy(1.0 - mask.astype(np.float32))[None, None]
    filled = _pull_push(pixels * known, known)[0].permute(1, 2, 0)
    return np.where(mask[..., None] == 1, filled.round().to(torch.uint8).numpy(), image)


def _pull_push(pixels: Tensor, known: Tensor) -> Tensor:
    """Fill from the next coarser level, recursively; pixels (1, 3, h, w) are 0 where unknown."""
    if known.all():
        return pixels
    if max(known.shape[-2:]) == 1:
        return torch.full_like(pixels, NEUTRAL_GREY)
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    mean = F.avg_pool2d(pixels, 2, ceil_mode=True) / share.clamp(min=torch.finfo().tiny)
    coarse = _pull_push(mean, (share > 0).float())
    smooth = F.interpolate(coarse, size=known.shape[-2:], mode="bilinear")
    return torch.where(known > 0, pixels, smooth)


def blend(image: np.ndarray, *, fill: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mix a fill into a picture, both (H, W, 3) uint8, by a weight (H, W) uint8 [0, 255].

    Weight 0 returns the picture's own bits, 255 the fill's.
    """
    share = weight[..., None].astype(np.float32) / 255.0
    mixed = image + share * (fill.astype(np.float32) - image)
    return np.rint(mixed).astype(np.uint8)
