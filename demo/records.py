"""COCO's way to write down a mask: polygons, run lengths, box and area.

Polygons follow the edges of the pixels, so that pycocotools decodes them to the visible pixels bit
for bit; what a thing's neighbour hides is not in its mask, as COCO's annotators leave it out.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

# Steps along pixel edges with the mask on the right-hand side, y down: right, down, left, up.
STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
Corner = tuple[int, int]


def describe_mask(mask: np.ndarray, *, is_crowd: bool) -> dict[str, Any]:
    """Return COCO's segmentation, area, bbox (x, y, width, height) and iscrowd.

    Args:
        mask: (H, W) bool, with at least one pixel.
        is_crowd: run lengths instead of polygons.
    """
    xs, ys = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    left, top = int(xs[0]), int(ys[0])
    return {
        "segmentation": encode_runs(mask) if is_crowd else trace_polygons(mask),
        "area": int(mask.sum()),
        "bbox": [left, top, int(xs[-1]) + 1 - left, int(ys[-1]) + 1 - top],
        "iscrowd": int(is_crowd),
    }


def encode_runs(mask: np.ndarray) -> dict[str, list[int]]:
    """Return COCO's uncompressed RLE: runs of 0 and 1 in turn, column by column, 0 first."""
    pixels = mask.T.ravel()
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    bounds = np.concatenate([[0], changes, [pixels.size]])
    counts = np.diff(bounds).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


def trace_polygons(mask: np.ndarray) -> list[list[float]]:
    """Return the outlines of a mask as COCO polygons [x0, y0, x1, y1, ...] along pixel edges.

    COCO's polygons know no holes: a part with a hole is cut in two through the hole.

    Args:
        mask: (H, W) bool.
    """
    polygons = []
    for loop in _trace_loops(mask):
        xs = [x for x, _ in loop]
        if _signed_area(loop) < 0:
            cut = (min(xs) + max(xs) + 1) // 2
            sides = np.arange(mask.shape[1]) < cut
            return trace_polygons(mask & sides) + trace_polygons(mask & ~sides)
        polygons.append([float(value) for corner in loop for value in corner])
    return polygons


def _trace_loops(mask: np.ndarray) -> list[list[Corner]]:
    """Walk all borders with the mask on the right: outlines turn clockwise, holes don't."""
    padded = np.pad(mask, 1)
    inside, above, left = padded[1:, 1:], padded[:-1, 1:], padded[1:, :-1]
    starts: dict[Corner, list[int]] = {}
    # A border runs right along a pixel's top, left along its bottom, up its left, down its right.
    for direction, edges, offset in (
        (0, inside & ~above, (0, 0)),
        (2, above & ~inside, (1, 0)),
        (3, inside & ~left, (0, 1)),
        (1, left & ~inside, (0, 0)),
    ):
        for y, x in np.argwhere(edges).tolist():
            starts.setdefault((x + offset[0], y + offset[1]), []).append(direction)
    loops = []
    while starts:
        corner, directions = next(iter(starts.items()))
        loops.append(_walk(starts, corner, directions[0]))
    return loops


def _walk(starts: dict[Corner, list[int]], corner: Corner, direction: int) -> list[Corner]:
    """Follow one border until it closes, taking its steps out of `starts`."""
    loop, previous = [], -1
    while corner in starts:
        options = starts[corner]
        # Where two pixels touch at a corner, turn right: the parts stay apart.
        turn_right = (previous + 1) % 4
        if previous >= 0:
            direction = turn_right if turn_right in options else options[0]
        options.remove(direction)
        if not options:
            del starts[corner]
        if direction != previous:
            loop.append(corner)
        corner = (corner[0] + STEPS[direction][0], corner[1] + STEPS[direction][1])
        previous = direction
        if corner == loop[0]:
            break
    return loop


def _signed_area(loop: list[Corner]) -> float:
    """Return the area, positive when the loop turns clockwise as seen (y down)."""
    closed = [*loop, loop[0]]
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise(closed)) / 2
