"""What holes training cuts: brush strokes, rectangles, objects and missing borders.

Every mask is built towards an area drawn from the allowed range and stops inside it, so a mask is
never empty, never full and never has to be thrown away. Lengths are given at 512 px and scale with
the picture. Terms: a *share* is the part of the picture that is hole, in (0, 1); *scale* is
size / 512; *bounds* is the range of allowed areas in whole pixels, both ends included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

ObjectMask = np.ndarray | Callable[[], np.ndarray]

# LaMa's thin, medium and thick strokes at 512 px: (most strokes, most width, most length of a
# segment). Source: Suvorov et al. 2022, arXiv 2109.07161, the training configurations.
BRUSHES = ((70, 20.0, 100.0), (10, 100.0, 200.0), (5, 250.0, 450.0))


def draw_mask(
    rng: np.random.Generator,
    *,
    size: int,
    mask_types: Mapping[str, float],
    area_range: tuple[float, float],
    object_masks: Sequence[ObjectMask] = (),
) -> np.ndarray:
    """Draw one hole of a type drawn from the mixture.

    Where no object suits the range, another type of the mixture is drawn ("irregular" if there is
    none), so a picture without annotations gets a hole too.

    Args:
        rng: the sample's generator; the mask depends on it and on the arguments alone.
        size: side of the mask in pixels.
        mask_types: probability of each type, as `parse_mask_types` returns.
        area_range: smallest and largest share of the picture, as `check_area_range` accepts.
        object_masks: the picture's instances, each a (size, size) uint8 {0, 1} array or a function
            that decodes one when it is needed.

    Returns:
        (size, size) uint8, 1 = hole, with a share inside `area_range`.

    Raises:
        ValueError: no whole number of pixels lies inside `area_range` at this size.
    """
    bounds = math.ceil(area_range[0] * size**2), math.floor(area_range[1] * size**2)
    if not 0 < bounds[0] <= bounds[1] < size**2:
        raise ValueError(
            f"--mask_area_range must hold a whole number of pixels at {size} px, "
            f"got {area_range[0]} {area_range[1]}. Widen it."
        )
    name = _choose(rng, mask_types)
    if name == "object":
        mask = _draw_objects(rng, size=size, bounds=bounds, object_masks=object_masks)
        if mask is not None:
            return mask.view(np.uint8)
        others = {other: share for other, share in mask_types.items() if other != "object"}
        name = _choose(rng, others) if others else "irregular"
    draw = {"irregular": _draw_strokes, "rectangle": _draw_rectangles, "outpaint": _draw_borders}
    return draw[name](rng, size=size, bounds=bounds).view(np.uint8)


def dilate(mask: np.ndarray, *, radius: int) -> np.ndarray:
    """Grow a mask by a disc.

    A disc is a stack of rows, so one pass that widens the mask pixel by pixel yields the rows of
    all heights: O(radius) NumPy operations, and only on the mask's own box.

    Args:
        mask: (H, W) uint8 {0, 1}.
        radius: in pixels; 0 leaves the mask as it is.

    Returns:
        (H, W) uint8 {0, 1}, a new array.
    """
    grown = mask.copy()
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if radius == 0 or rows.size == 0:
        return grown
    box = (
        slice(max(rows[0] - radius, 0), rows[-1] + radius + 1),
        slice(max(columns[0] - radius, 0), columns[-1] + radius + 1),
    )
    source, out = mask[box], grown[box]
    wide = source.copy()
    half_width = 0
    for dy in range(radius, -1, -1):
        while half_width < min(math.isqrt(radius**2 - dy**2), wide.shape[1] - 1):
            half_width += 1
            wide[:, half_width:] |= source[:, :-half_width]
            wide[:, :-half_width] |= source[:, half_width:]
        if dy < len(wide):
            out[dy:] |= wide[: len(wide) - dy]
            out[: len(wide) - dy] |= wide[dy:]
    return grown


def paint_stroke(draw: ImageDraw.ImageDraw, points: np.ndarray, *, width: float) -> None:
    """Paint a stroke (value 1) with round joints and ends.

    Args:
        draw: onto what; what falls outside is left away.
        points: (N, 2) float (x, y) in pixels.
        width: in pixels; a stroke is never thinner than one.
    """
    corners = [(float(x), float(y)) for x, y in points]
    draw.line(corners, fill=1, width=max(round(width), 1))
    radius = width / 2
    for x, y in corners:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)


def _choose(rng: np.random.Generator, mask_types: Mapping[str, float]) -> str:
    """Draw a type in proportion to its weight."""
    names = list(mask_types)
    edges = np.cumsum([mask_types[name] for name in names])
    return names[int(np.searchsorted(edges[:-1], rng.random() * edges[-1], side="right"))]


def _add(mask: np.ndarray, shape: np.ndarray, *, rank: np.ndarray, room: tuple[int, int]) -> int:
    """Add a shape to a mask in place, leaving away its last part where it would be too much.

    Args:
        mask: (H, W) bool.
        shape: (H, W) bool.
        rank: (H, W) int >= 0: pixels of low rank come first. The cut falls between two ranks if
            that leaves enough, otherwise inside one.
        room: how many pixels to add, the fewest (where there are so many) and the most.

    Returns:
        The number of pixels added.
    """
    new = shape & ~mask
    num_new = np.count_nonzero(new)
    if num_new > room[1]:
        ranks = rank[new]
        totals = np.cumsum(np.bincount(ranks))  # with every pixel up to this rank
        last = int(np.searchsorted(totals, room[1], side="right"))  # the rank that is too much
        keep = ranks < last
        num_kept = np.count_nonzero(keep)
        if num_kept < room[0]:
            keep[np.flatnonzero(ranks == last)[: room[0] - num_kept]] = True
        new[new] = keep
        num_new = np.count_nonzero(new)
    mask |= new
    return int(num_new)


def _draw_strokes(rng: np.random.Generator, *, size: int, bounds: tuple[int, int]) -> np.ndarray:
    """Draw curved brush strokes, thin, medium or thick ones, until the area is reached.

    A brush that has made its most strokes is followed by the next thicker one.
    """
    scale = size / 512
    target = int(rng.integers(bounds[0], bounds[1] + 1))
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    mask = np.zeros((size, size), np.bool_)
    brush, num_strokes = int(rng.integers(len(BRUSHES))), 0
    while (missing := target - int(np.count_nonzero(mask))) > 0:
        if num_strokes == BRUSHES[brush][0] and brush < len(BRUSHES) - 1:
            brush, num_strokes = brush + 1, 0
        num_strokes += 1
        _, max_width, max_length = BRUSHES[brush]
        # A brush as wide as the whole hole would only ever leave discs.
        width = min(rng.uniform(5, 5 + max_width) * scale, 0.5 * math.sqrt(target))
        if missing < width**2 and target - missing >= bounds[0]:
            break  # a stroke cut so short would be a speck
        points = _draw_path(rng, size=size, max_length=max_length * scale)
        paint_stroke(draw, points, width=width)
        painted = np.array(canvas).view(np.bool_)
        if np.count_nonzero(painted) <= bounds[1]:
            mask = painted
        else:
            _add_stroke(mask, points, width=width, target=target)
    return mask


def _draw_path(rng: np.random.Generator, *, size: int, max_length: float) -> np.ndarray:
    """Return the points (N, 2) of a smooth stroke, in pixels; it may leave the picture."""
    num_segments = int(rng.integers(1, 6))
    turns = rng.uniform(-1.6, 1.6, num_segments)
    turns[0] = rng.uniform(0, 2 * math.pi)
    headings = np.cumsum(turns)
    lengths = rng.uniform(0.1, 1.1, num_segments) * max_length
    steps = lengths[:, None] * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    points = rng.uniform(0, size, 2) + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    for _ in range(2 if num_segments > 1 else 0):  # Chaikin's corner cutting
        near, far = 0.75 * points[:-1] + 0.25 * points[1:], 0.25 * points[:-1] + 0.75 * points[1:]
        inner = np.stack([near, far], axis=1).reshape(-1, 2)[1:-1]
        points = np.concatenate([points[:1], inner, points[-1:]])
    return points


def _add_stroke(mask: np.ndarray, points: np.ndarray, *, width: float, target: int) -> None:
    """Add in place as much of a stroke, from its beginning, as the mask lacks to its target."""
    size = len(mask)
    room = target - int(np.count_nonzero(mask))
    reach = width / 2 + 2
    for start, end in pairwise(points):
        left, top = np.clip(np.minimum(start, end) - reach, 0, size).astype(int)
        right, bottom = np.clip(np.maximum(start, end) + reach, 0, size).astype(int)
        if left == right or top == bottom:
            continue  # outside the picture
        canvas = Image.new("L", (right - left, bottom - top))
        paint_stroke(ImageDraw.Draw(canvas), np.stack([start, end]) - (left, top), width=width)
        x, y = np.arange(left, right) - start[0], np.arange(top, bottom) - start[1]
        room -= _add(
            mask[top:bottom, left:right],
            np.asarray(canvas).view(np.bool_),
            rank=np.hypot(x, y[:, None]).astype(np.int64),
            room=(room, room),
        )
        if room == 0:
            return


def _draw_rectangles(rng: np.random.Generator, *, size: int, bounds: tuple[int, int]) -> np.ndarray:
    """Draw one to four boxes, and more where overlaps have left too little."""
    target = int(rng.integers(bounds[0], bounds[1] + 1))
    num_boxes = int(rng.integers(1, 5))
    min_area = min((30 * size / 512) ** 2, bounds[0])
    mask = np.zeros((size, size), np.bool_)
    columns = np.broadcast_to(np.arange(size), (size, size))
    area = 0
    while num_boxes > 0 or area < bounds[0]:
        part = rng.uniform(0.3, 0.8) if num_boxes > 1 else 1.0
        box_area = max(part * (target - area), min_area)
        width = math.sqrt(box_area * math.exp(rng.uniform(-1, 1)))
        width = max(round(min(max(width, box_area / size), size)), 1)
        height = min(max(round(box_area / width), 1), size)
        left, top = rng.integers(size - width + 1), rng.integers(size - height + 1)
        box = np.zeros_like(mask)
        box[top : top + height, left : left + width] = True
        area += _add(mask, box, rank=columns, room=(max(bounds[0] - area, 0), bounds[1] - area))
        num_boxes -= 1
    return mask


def _draw_borders(rng: np.random.Generator, *, size: int, bounds: tuple[int, int]) -> np.ndarray:
    """Cut bands off one to four sides, as for extending a picture.

    The bands grow from their sides at speeds of their own; all that can happen is that they take
    one more row or column, so the areas of all moments follow from counting rows and columns.
    """
    target = int(rng.integers(bounds[0], bounds[1] + 1))
    sides = rng.permutation(4)[: int(rng.integers(1, 5))]
    pace = np.full(4, np.inf)  # moments a pixel for left, right, top, bottom; inf: no band
    pace[sides] = 1 / rng.uniform(0.3, 1, len(sides))
    inward = np.arange(1, size + 1)
    across = np.minimum(inward * pace[0], inward[::-1] * pace[1])  # when each column is taken
    down = np.minimum(inward * pace[2], inward[::-1] * pace[3])
    moments = np.unique(np.concatenate([across, down]))
    moments = moments[np.isfinite(moments)]
    kept_columns = size - np.searchsorted(np.sort(across), moments, side="right")
    kept_rows = size - np.searchsorted(np.sort(down), moments, side="right")
    areas = size**2 - kept_columns * kept_rows
    best = int(np.argmin(np.abs(areas - target)))
    if bounds[0] <= areas[best] <= bounds[1]:
        return (across <= moments[best]) | (down <= moments[best])[:, None]
    # A range narrower than a row: all of the moments before, and as much of the next as it takes.
    best = int(np.searchsorted(areas, bounds[1], side="right"))
    mask = (across < moments[best]) | (down < moments[best])[:, None]
    taken = (across <= moments[best]) | (down <= moments[best])[:, None]
    room = target - int(np.count_nonzero(mask))
    _add(mask, taken, rank=np.zeros((size, size), np.int64), room=(room, room))
    return mask


def _draw_objects(
    rng: np.random.Generator,
    *,
    size: int,
    bounds: tuple[int, int],
    object_masks: Sequence[ObjectMask],
) -> np.ndarray | None:
    """Join grown objects in random order until they suit; None if they never do.

    Growing covers the rim that annotators leave away, which would tell what stood there.
    """
    radius = round(rng.uniform(2, 10) * size / 512)
    mask = np.zeros((size, size), np.bool_)
    for index in rng.permutation(len(object_masks)):
        entry = object_masks[index]
        decoded = entry if isinstance(entry, np.ndarray) else entry()
        joined = mask | dilate(decoded, radius=radius).view(np.bool_)
        area = np.count_nonzero(joined)
        if area <= bounds[1]:
            mask = joined
        if bounds[0] <= area <= bounds[1]:
            return mask
    return None
