"""Fills that have learned nothing: what a trained ControlNet has to beat.

Pure functions of a picture and its hole. None of them sees what lies under the hole: other pixels
there give the same bits. Known pixels come back as they are.
"""

from __future__ import annotations

import cv2
import numpy as np

from inpainting.holes import fill_hole
from inpainting.masks import dilate

# How far OpenCV looks around a pixel that it fills, in pixels at any size of the picture: it works
# inwards from the rim, and a larger radius blurs without reaching further. OpenCV's examples use 3.
INPAINT_RADIUS_PX = 3
RING_WIDTH_PX = 8  # of the surroundings that count for the mean, in pixels of a 512 px picture


def fill_telea(image: np.ndarray, *, mask: np.ndarray) -> np.ndarray:
    """Fill from the rim inwards by weighted means of what is known nearby.

    Source: Telea 2004, "An Image Inpainting Technique Based on the Fast Marching Method".

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) uint8, 1 = hole, with at least one known pixel.

    Returns:
        (H, W, 3) uint8.
    """
    return _inpaint(image, mask=mask, method=cv2.INPAINT_TELEA)


def fill_navier_stokes(image: np.ndarray, *, mask: np.ndarray) -> np.ndarray:
    """Fill by continuing lines of equal brightness into the hole, as a fluid flows.

    Source: Bertalmio et al. 2001, "Navier-Stokes, Fluid Dynamics, and Image and Video Inpainting".

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) uint8, 1 = hole, with at least one known pixel.

    Returns:
        (H, W, 3) uint8.
    """
    return _inpaint(image, mask=mask, method=cv2.INPAINT_NS)


def fill_mean_color(image: np.ndarray, *, mask: np.ndarray) -> np.ndarray:
    """Paint the whole hole in one colour, the mean of the pixels in a ring around it.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) uint8, 1 = hole, with at least one pixel of each.

    Returns:
        (H, W, 3) uint8.
    """
    radius = max(round(RING_WIDTH_PX * min(mask.shape) / 512), 1)
    ring = dilate(mask, radius=radius) > mask
    filled = image.copy()
    filled[mask == 1] = np.rint(image[ring].mean(axis=0)).astype(np.uint8)
    return filled


def _inpaint(image: np.ndarray, *, mask: np.ndarray, method: int) -> np.ndarray:
    """Fill by one of OpenCV's two methods.

    Where a hole touches the picture's border, OpenCV (4.10 and 5.0) mixes what lies under it into
    the result. So a smooth continuation of the known pixels lies there.
    """
    return cv2.inpaint(fill_hole(image, mask=mask), mask, INPAINT_RADIUS_PX, method)
