"""How good a filled hole is, and how sure one can be of a mean or a comparison.

Pure functions. Pictures are (H, W, 3) uint8, masks (H, W) uint8 with 1 = hole and with at least one
pixel of each. The *result* is what a method made of the *image* that it was given; the *truth* is
the photograph before the hole was cut. What is measured in the hole doesn't see the known pixels:
whether a method changed those is a question of its own (`num_changed_known`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from inpainting.masks import dilate
from inpainting.randomness import generator

# A perfect fill's PSNR would be infinite, and so would every mean that it enters. Rounding to whole
# grey levels alone costs a mean squared error of 1/12, so no picture of 8 bits says more than that:
# PSNR ends there, at 58.92 dB.
MAX_PSNR = 10 * math.log10(255**2 * 12)
SEAM_WIDTH_PX = 3  # of the band on each side of the hole's edge, in pixels of a 512 px picture


# One result


def psnr_hole(result: np.ndarray, *, truth: np.ndarray, mask: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of the hole's pixels in dB, at most `MAX_PSNR`."""
    hole = mask == 1
    psnr = peak_signal_noise_ratio(
        torch.from_numpy(result[hole].astype(np.float64)),
        torch.from_numpy(truth[hole].astype(np.float64)),
        data_range=255.0,
    )
    return min(float(psnr), MAX_PSNR)


def ssim_hole(result: np.ndarray, *, truth: np.ndarray, mask: np.ndarray) -> float:
    """Return the structural similarity in [-1, 1], 1 = equal, averaged over the hole and RGB.

    The window (Gaussian, sigma 1.5 px at any size) of a pixel near the rim reaches over the known
    pixels; the truth's stand there, whatever the result's are. Good to 0.001: variances are
    differences of squares, so in float32 a bright flat area may be only 0.999 like itself.
    Source: Wang et al. 2004, "Image Quality Assessment", equation 13.
    """
    hole = mask == 1
    pair = np.stack([np.where(hole[..., None], result, truth), truth])
    # float64 would be exact, and takes seconds for a picture where float32 takes a fifth of one.
    tensors = torch.from_numpy(pair.astype(np.float32)).permute(0, 3, 1, 2)
    _, similarity = structural_similarity_index_measure(
        tensors[:1], tensors[1:], data_range=255.0, return_full_image=True
    )
    return float(similarity[0, :, torch.from_numpy(hole)].mean())


def l1_hole(result: np.ndarray, *, truth: np.ndarray, mask: np.ndarray) -> float:
    """Return the mean absolute difference in the hole, in [0, 1] (255 grey levels = 1)."""
    hole = mask == 1
    return float(np.abs(result[hole].astype(np.float64) - truth[hole]).mean() / 255)


def seam_error(result: np.ndarray, *, truth: np.ndarray, mask: np.ndarray) -> float:
    """Return how much more or less than the truth the result changes at the hole's edge.

    That is the mean absolute difference of their forward differences, across and down, between
    neighbours that both lie in a band around the edge: the grown hole without the shrunken one. A
    hole that ends at the picture's border has no seam there. The result's known pixels count as
    they are.

    Returns:
        In [0, 2]: 255 grey levels = 1, and a slope may be as far off as from -1 to 1.
    """
    width = max(round(SEAM_WIDTH_PX * min(mask.shape) / 512), 1)
    band = (dilate(mask, radius=width) & dilate(1 - mask, radius=width)) == 1
    error = (result.astype(np.float64) - truth) / 255
    across = np.diff(error, axis=1)[band[:, 1:] & band[:, :-1]]
    down = np.diff(error, axis=0)[band[1:] & band[:-1]]
    return float(np.abs(np.concatenate([across, down])).mean())


def num_changed_known(result: np.ndarray, *, image: np.ndarray, mask: np.ndarray) -> int:
    """Count the known pixels that differ, in any channel, from those that the method was given."""
    return int(np.count_nonzero((result != image).any(axis=2) & (mask == 0)))


# Several results


def mean_of_samples(samples: Sequence[np.ndarray]) -> np.ndarray:
    """Average several fills of one hole, the best guess by squared error that they contain.

    Args:
        samples: one or more pictures of one shape, uint8.

    Returns:
        A picture of the same shape, uint8, halves rounded to the even neighbour.
    """
    return np.rint(np.mean(samples, axis=0, dtype=np.float64)).astype(np.uint8)


def bootstrap_interval(
    values: np.ndarray, *, seed: int, level: float = 0.95, num_resamples: int = 2000
) -> tuple[float, float]:
    """Return an interval for the mean, from the means of resampled values (percentile method).

    For comparing two methods on the same pictures, give the differences picture by picture.
    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3.

    Args:
        values: (N,) float, finite, one for each picture, N >= 1.
        seed: the interval depends on it and on the arguments alone.
        level: share of the resampled means that lie inside, in (0, 1).
        num_resamples: how many means are drawn.

    Returns:
        (low, high), in the values' unit.
    """
    rng = generator(seed, "bootstrap")
    num = len(values)
    means = [values[rng.integers(num, size=num)].mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def win_shares(values: Mapping[str, np.ndarray], *, higher_is_better: bool) -> dict[str, float]:
    """Return on which share of the pictures each method is the best of all.

    Args:
        values: by method, one number for each picture: (N,) float, N >= 1.
        higher_is_better: otherwise the lowest wins.

    Returns:
        By method, in the order given, a share in [0, 1]; they sum to 1. Methods that are equally
        good share the picture in equal parts.
    """
    table = np.stack(list(values.values()))
    best = table.max(axis=0) if higher_is_better else table.min(axis=0)
    is_best = table == best
    shares = (is_best / is_best.sum(axis=0)).mean(axis=1)
    return dict(zip(values, shares.tolist(), strict=True))
