"""The holes of the evaluation: one of each kind for every picture, the same for everyone for ever.

Thin, medium and thick holes follow LaMa's presets of these names, object holes an object of the
picture. They hang on the picture's id and on the constants below, never on a run's seed, and they
don't follow `masks.py` where training's holes change: numbers of different years stay comparable.
Changing what is drawn here is a decision; a test holds the hashes.

What tells LaMa's three kinds apart is how far a hole's pixels lie from known ones, not its area:
each covers a quarter of the picture on average.

Lengths are given at 512 px and scale with the picture, and whether a hole is drawn anew is decided
at 512 px, so that a hole looks the same at every size. Terms: a *share* is the part of the picture
that is hole, in (0, 1).
Source: Suvorov et al. 2022, arXiv 2109.07161; the numbers stand in LaMa's configs/data_gen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from inpainting.masks import ObjectMask, dilate, paint_stroke
from inpainting.randomness import generator

HOLE_KINDS = ("thin", "medium", "thick", "object")

BENCHMARK_SEED = 2109_07161  # fixed for ever
MAX_SHARE = 0.5  # at 512 px; LaMa's max_tamper_area
MIN_OBJECT_SHARE = 0.02  # below it metrics measure little more than the rim
OBJECT_MARGIN_PX = 6  # at 512 px: how far an object hole reaches beyond the annotated outline

_SIDE = 512  # of the picture that lengths are given for
_MAX_DRAWS = 100  # one thick hole in three is too large: 100 in a row don't happen


@dataclass(frozen=True)
class _Boxes:
    """How many boxes, in pixels at 512: their sides, and their distance from the borders."""

    num: tuple[int, int]
    side: tuple[float, float]
    border: float


@dataclass(frozen=True)
class _Preset:
    """What LaMa draws: strokes, or boxes instead with `_BOXES_PROB`; pixels at 512.

    Attributes:
        num_strokes: the fewest and the most.
        max_width: a segment is 5 px and up to this wider.
        max_length: a segment is 10 px and up to this longer.
        boxes: None where there are only strokes.
    """

    num_strokes: tuple[int, int]
    max_width: float
    max_length: float
    boxes: _Boxes | None


_PRESETS = {
    "thin": _Preset((4, 70), 20, 100, boxes=None),
    "medium": _Preset((4, 10), 100, 200, boxes=_Boxes((1, 5), side=(30, 150), border=0)),
    "thick": _Preset((1, 5), 250, 450, boxes=_Boxes((1, 4), side=(30, 300), border=10)),
}
_BOXES_PROB = 0.3 / (1 + 0.3)  # LaMa's weights are 1 for strokes and 0.3 for boxes; one is drawn


def draw_benchmark_hole(
    kind: str, *, size: int, image_id: int, object_masks: Sequence[ObjectMask]
) -> np.ndarray | None:
    """Draw the hole of one kind that belongs to a picture.

    Args:
        kind: one of `HOLE_KINDS`.
        size: side of the picture in pixels, 64 or more.
        image_id: of the picture, >= 0.
        object_masks: the picture's instances, each a (size, size) uint8 {0, 1} array or a function
            that decodes one; only "object" looks at them.

    Returns:
        (size, size) uint8, 1 = hole, never empty and at most `MAX_SHARE` of the picture (a little
        more where thin strokes are rounded up to whole pixels of a small picture). None for
        "object" where no object gives a hole of `MIN_OBJECT_SHARE` to `MAX_SHARE`.
    """
    if kind == "object":
        return _draw_object(image_id=image_id, size=size, object_masks=object_masks)
    for attempt in range(_MAX_DRAWS):
        if 0 < _draw_preset(kind, image_id, attempt, size=_SIDE).mean() <= MAX_SHARE:
            return _draw_preset(kind, image_id, attempt, size=size)
    raise AssertionError(f"no {kind} hole of a sane share for id {image_id} in {_MAX_DRAWS} draws")


def _draw_preset(kind: str, image_id: int, attempt: int, *, size: int) -> np.ndarray:
    """Draw strokes or boxes at an address, (size, size) uint8: the same ones at every size."""
    rng = generator(BENCHMARK_SEED, f"benchmark hole {kind}", image_id, attempt)
    preset = _PRESETS[kind]
    if preset.boxes is not None and rng.random() < _BOXES_PROB:
        return _draw_boxes(rng, size=size, boxes=preset.boxes)
    return _draw_strokes(rng, size=size, preset=preset)


def _draw_strokes(rng: np.random.Generator, *, size: int, preset: _Preset) -> np.ndarray:
    """Draw LaMa's strokes: walks of one to five straight segments, each of a width of its own.

    A walk keeps to one side of the vertical, the next one to the other; it stops at a border and
    goes on from there. Unlike LaMa's, lengths and headings are no whole numbers (of pixels and
    radians), for these would differ between sizes.
    """
    scale = size / _SIDE
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    fewest, most = preset.num_strokes
    for stroke in range(int(rng.integers(fewest, most + 1))):
        side = 1 if stroke % 2 else -1
        point = rng.uniform(0, _SIDE, 2)
        for _ in range(int(rng.integers(1, 6))):
            heading = rng.uniform(0, math.pi)
            length = rng.uniform(10, 10 + preset.max_length)
            width = rng.uniform(5, 5 + preset.max_width)
            step = length * np.array([side * math.sin(heading), math.cos(heading)])
            end = np.clip(point + step, 0, _SIDE)
            paint_stroke(draw, np.stack([point, end]) * scale, width=width * scale)
            point = end
    return np.array(canvas)


def _draw_boxes(rng: np.random.Generator, *, size: int, boxes: _Boxes) -> np.ndarray:
    """Draw upright boxes, which may overlap."""
    scale = size / _SIDE
    hole = np.zeros((size, size), np.uint8)
    for _ in range(int(rng.integers(boxes.num[0], boxes.num[1] + 1))):
        sides = rng.uniform(*boxes.side, 2)
        corner = rng.uniform(boxes.border, _SIDE - boxes.border - sides)
        left, top = np.rint(corner * scale).astype(int)
        right, bottom = np.rint((corner + sides) * scale).astype(int)
        hole[top:bottom, left:right] = 1
    return hole


def _draw_object(
    *, image_id: int, size: int, object_masks: Sequence[ObjectMask]
) -> np.ndarray | None:
    """Return the first object, in drawn order, that gives a hole of a sane share once grown.

    Growing covers the rim that annotators leave away, which would tell what stood there.
    """
    radius = max(round(OBJECT_MARGIN_PX * size / _SIDE), 1)
    rng = generator(BENCHMARK_SEED, "benchmark hole object", image_id)
    for index in rng.permutation(len(object_masks)):
        entry = object_masks[index]
        hole = dilate(entry if isinstance(entry, np.ndarray) else entry(), radius=radius)
        if MIN_OBJECT_SHARE <= hole.mean() <= MAX_SHARE:
            return hole
    return None
