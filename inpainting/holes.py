"""Holes and pixels: where a picture is worked on, which part of it is hole, what is put there.

Pure functions of arrays. Masks are uint8, 1 = hole.

Terms: *source* pixels are the picture's own; the *crop* is the part that is worked on; *working*
pixels are what the networks see; a *cell* is one latent pixel, `stride` working pixels wide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F

# What a hole becomes when nothing is known: mid-grey, about 0 in the VAE's range.
NEUTRAL_GREY = 128.0
FOUR_NEIGHBOURS = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32)
MAX_PROPORTION = 16  # of a picture's sides: 512 x 8192 working pixels


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


def check_proportions(height: int, width: int) -> None:
    """Refuse a picture whose short side, brought to the working size, makes the other one huge.

    Raises:
        ValueError: says how thin it is.
    """
    if max(height, width) > MAX_PROPORTION * min(height, width):
        raise ValueError(
            f"one side of a picture must be at most {MAX_PROPORTION} times as long as the other, "
            f"got {width}x{height}. Cut it into pieces."
        )


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
    """Grow the hole by radius_px pixels to all sides, (H, W) uint8.

    Corners stay square, unlike `masks.dilate`'s: `fade_mask` needs the window of its box blur.
    """
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
    if width_px == 0:
        return mask * np.uint8(255)
    # A box blur of radius r over a hole grown by g ramps from g - r to g + r outside of it.
    grown = grow_mask(mask, radius_px=width_px - width_px // 2)
    ramp = Image.fromarray(grown * np.uint8(255)).filter(ImageFilter.BoxBlur(width_px // 2))
    return np.asarray(ramp)


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


def meet_edge(
    fill: np.ndarray, *, image: np.ndarray, mask: np.ndarray, width_px: int
) -> np.ndarray:
    """Take from a fill what would show as a seam at the hole's edge, where the truth is near.

    A VAE gives known pixels back changed, and latent cells know no finer edge than their own side.
    Two things are carried from the known pixels into the hole, ring by ring, each pixel the mean of
    its four neighbours in the rings before: the fill's error, which is known outside the hole and
    taken off, less and less over width_px; and the known colours, which are mixed in over the first
    quarter of width_px, from a half downwards: the step at the edge shrinks, and the hole is filled
    as well as before. The half and the quarter were found by experiment (docs/log.md).

    Args:
        fill: (H, W, 3) uint8, drawn on both sides of the edge.
        image: (H, W, 3) uint8; what lies under the hole isn't looked at.
        mask: (H, W) uint8, 1 = hole.
        width_px: how far into the hole the fill changes.

    Returns:
        (H, W, 3) uint8.
    """
    reached = (mask == 0).astype(np.float32)
    colors = image.astype(np.float32)
    carried = np.dstack([colors - fill, colors]) * reached[..., None]
    result = fill.astype(np.float32)
    for ring in range(width_px):
        total, count = (
            cv2.filter2D(part, -1, FOUR_NEIGHBOURS, borderType=cv2.BORDER_REFLECT)
            for part in (carried, reached)
        )
        is_next = (reached == 0) & (count > 0.5)
        carried[is_next] = total[is_next] / count[is_next][:, None]
        reached[is_next] = 1
        error, color = np.split(carried[is_next], 2, axis=1)
        drawn = result[is_next] + error * (1 - ring / width_px)
        share = max(0.0, 0.5 * (1 - 4 * ring / width_px))
        result[is_next] = drawn + share * (color - drawn)
    return np.rint(result).clip(0, 255).astype(np.uint8)


def blend(image: np.ndarray, *, fill: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mix a fill into a picture, both (H, W, 3) uint8, by a weight (H, W) uint8 [0, 255].

    Weight 0 returns the picture's own bits, 255 the fill's.
    """
    share = weight[..., None].astype(np.float32) / 255.0
    mixed = image + share * (fill.astype(np.float32) - image)
    return np.rint(mixed).astype(np.uint8)
