"""Deciding which rows of COCO's files can be used, and bringing every mask into one form.

Everything that comes from a file is checked here, before pycocotools sees it: its C code trusts
its input (a NaN in a polygon takes all memory, run lengths that fall short show uninitialised
memory). A bad row raises `BadRecordError`, which the index counts.

Terms: a *row* is one entry of a file's table, as decoded from json. *RLE* are run lengths, column
by column, beginning with a run of zeros; COCO knows them as a list of integers and as *compressed*
text, pycocotools' own form, which is the one kept.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple, cast

import numpy as np
from pycocotools import mask as coco_mask

MAX_ID = 2**63 - 1  # ids are stored as int64 and seed the samples' generators
MAX_SIDE_PX = 65_535  # JPEG's limit
MAX_PICTURE_PX = 178_956_970  # Pillow refuses larger ones as decompression bombs
# pycocotools walks along the whole outline in fifths of a pixel, 16 bytes a step; outlines of real
# objects have some thousand pixels.
MAX_OUTLINE_PX = 1_000_000
MAX_SHOWN = 200  # characters of a bad value that are told
NUM_EXAMPLES = 5  # rows of a kind of fault that are told

# A captions file may speak of more pictures than are used: no fault of its rows.
UNUSED_CAPTION = '"image_id" must be one of the data set\'s'
_COUNTS_REASON = 'the "counts" of an RLE must be integers or compressed text'


class BadRecordError(ValueError):
    """One row that cannot be used.

    Attributes:
        reason: what must hold; the same words for every row of this kind.
    """

    def __init__(self, reason: str, got: object) -> None:
        shown = reprlib.repr(got)
        if len(shown) > MAX_SHOWN:
            shown = f"{shown[:MAX_SHOWN]}..."
        super().__init__(f"{reason}, got {shown}")
        self.reason = reason


@dataclass(frozen=True)
class Problem:
    """One kind of fault: how many rows were left out for it, and the first of them in words."""

    count: int
    examples: tuple[str, ...]


@dataclass
class ProblemLog:
    """The rows that were left out, by kind.

    Attributes:
        kinds: a count and the first examples of each kind, "table: what must hold".
        on_problem: is told the kind and the words of every row, not only of the first.
    """

    kinds: dict[str, Problem] = field(default_factory=dict)
    on_problem: Callable[[str, str], None] | None = None

    def add(self, table: str, row: str, error: BadRecordError) -> None:
        """Count one row of a table as left out; `row` names it in the example."""
        self.add_words(f"{table}: {error.reason}", f"{row}: {error}")

    def add_words(self, kind: str, words: str) -> None:
        """Count one row as left out, by its kind and what is told of it."""
        seen = self.kinds.get(kind, Problem(count=0, examples=()))
        examples = seen.examples
        if len(examples) < NUM_EXAMPLES:
            examples = (*examples, words)
        self.kinds[kind] = Problem(count=seen.count + 1, examples=examples)
        if self.on_problem is not None:
            self.on_problem(kind, words)


def is_fault(kind: str) -> bool:
    """Tell whether rows of a kind are bad themselves, or only of no use here."""
    return kind != f"captions: {UNUSED_CAPTION}"


class Picture(NamedTuple):
    """One usable row of "images"; height and width in pixels, 0 where they are not known."""

    image_id: int
    file_name: str
    height: int
    width: int


class InstanceRecord(NamedTuple):
    """One usable row of "annotations"; `counts` is compressed RLE, `area_px` what it covers."""

    annotation_id: int
    image_id: int
    category_id: int
    is_crowd: bool
    area_px: int
    counts: bytes


def parse_picture(row: object) -> Picture:
    """Check one row of "images".

    Raises:
        BadRecordError: if the row cannot be used.
    """
    fields = _fields(row)
    image_id = _integer(fields, "id", low=0, high=MAX_ID)
    file_name = _file_name(fields.get("file_name"))
    height = _integer(fields, "height", low=1, high=MAX_SIDE_PX)
    width = _integer(fields, "width", low=1, high=MAX_SIDE_PX)
    if height * width > MAX_PICTURE_PX:
        raise BadRecordError(f"a picture must have at most {MAX_PICTURE_PX} pixels", height * width)
    return Picture(image_id, file_name, height, width)


def parse_category(row: object) -> tuple[int, str]:
    """Return id and name of one row of "categories".

    Raises:
        BadRecordError: if the row cannot be used.
    """
    fields = _fields(row)
    return _integer(fields, "id", low=0, high=MAX_ID), _words(fields, "name")


def parse_caption(row: object) -> tuple[int, str]:
    """Return the image id and the stripped text of one row of a captions file.

    Raises:
        BadRecordError: if the row cannot be used.
    """
    fields = _fields(row)
    return _integer(fields, "image_id", low=0, high=MAX_ID), _words(fields, "caption")


def parse_instance(row: object, pictures: Mapping[int, Picture | None]) -> InstanceRecord | None:
    """Check one row of an instances file and bring its mask into compressed RLE.

    Args:
        row: the row as decoded from json.
        pictures: by image id; None for a picture that was itself left out.

    Returns:
        The record, or None where its picture was left out, which is not this row's fault.

    Raises:
        BadRecordError: if the row cannot be used.
    """
    fields = _fields(row)
    image_id = _integer(fields, "image_id", low=0, high=MAX_ID)
    if image_id not in pictures:
        raise BadRecordError('"image_id" must be the id of a row of "images"', image_id)
    picture = pictures[image_id]
    if picture is None:
        return None
    annotation_id = _integer(fields, "id", low=0, high=MAX_ID)
    category_id = _integer(fields, "category_id", low=0, high=MAX_ID)
    is_crowd = fields.get("iscrowd", 0)
    if type(is_crowd) not in (int, bool) or is_crowd not in (0, 1):
        raise BadRecordError('"iscrowd" must be 0 or 1', is_crowd)
    counts = compress(fields.get("segmentation"), height=picture.height, width=picture.width)
    area = coco_mask.area({"size": [picture.height, picture.width], "counts": counts})
    return InstanceRecord(annotation_id, image_id, category_id, bool(is_crowd), int(area), counts)


def compress(segmentation: object, *, height: int, width: int) -> bytes:
    """Bring one "segmentation" of any of COCO's three kinds into compressed RLE.

    Decoding it equals `pycocotools.coco.COCO.annToMask` bit for bit.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, ...] in pixels, or {"size": [height,
            width], "counts": a list of integers or compressed text}.
        height: the picture's, in pixels.
        width: the picture's, in pixels.

    Raises:
        BadRecordError: if pycocotools cannot be trusted with it.
    """
    if isinstance(segmentation, list):
        _check_polygons(segmentation, height=height, width=width)
        parts = coco_mask.frPyObjects(segmentation, height, width)
        return cast(Any, coco_mask.merge(parts))["counts"]
    if not isinstance(segmentation, dict):
        raise BadRecordError('"segmentation" must be a list of polygons or an RLE', segmentation)
    if segmentation.get("size") != [height, width]:
        raise BadRecordError(
            'the "size" of an RLE must be [height, width] of its picture', segmentation.get("size")
        )
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        _check_runs(_runs_of_text(counts), num_pixels=height * width)
        return counts.encode("ascii")
    if not isinstance(counts, list) or set(map(type, counts)) != {int}:
        raise BadRecordError(_COUNTS_REASON, counts)
    _check_runs(counts, num_pixels=height * width)
    rle = {"size": [height, width], "counts": counts}
    return coco_mask.frPyObjects(cast(Any, rle), height, width)["counts"]


def _check_polygons(polygons: list[Any], *, height: int, width: int) -> None:
    if not polygons:
        raise BadRecordError('"segmentation" must hold at least one polygon', polygons)
    outline_px = 0.0  # an upper bound
    for polygon in polygons:
        if not isinstance(polygon, list):
            raise BadRecordError("a polygon must be a list of numbers", polygon)
        if len(polygon) < 6 or len(polygon) % 2:
            raise BadRecordError(
                "a polygon must be a list x0, y0, x1, y1, ... of at least 3 points", polygon
            )
        # Plain Python: for the 20 or 50 numbers of a polygon it is faster than NumPy. The sum shows
        # NaN and inf wherever they stand, which min and max do not.
        try:
            is_finite = math.isfinite(sum(polygon))
        except (TypeError, OverflowError) as error:
            raise BadRecordError("a polygon must be a list of numbers", polygon) from error
        if not is_finite:
            raise BadRecordError("the coordinates of a polygon must be finite", polygon)
        xs, ys = polygon[0::2], polygon[1::2]
        left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
        if left < -width or right > 2 * width or top < -height or bottom > 2 * height:
            raise BadRecordError(
                "a polygon must lie within one picture size around its picture",
                (left, top, right, bottom),
            )
        outline_px += len(xs) * max(right - left, bottom - top)
    if outline_px > MAX_OUTLINE_PX:
        outline_px = sum(map(_outline_px, polygons))
    if outline_px > MAX_OUTLINE_PX:
        raise BadRecordError(
            f"the outline of an object must be at most {MAX_OUTLINE_PX} px long", round(outline_px)
        )


def _outline_px(polygon: list[float]) -> float:
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def _runs_of_text(text: str) -> list[int]:
    """Read the run lengths from compressed RLE.

    Each number is written in base 32, lowest digit first, one character 48 + digit each; bit 5 says
    that more digits follow, bit 4 of the last digit is the sign; from the third number on it is the
    difference to the last but one.

    Raises:
        BadRecordError: if the text is not made that way.

    Source: pycocotools, maskApi.c, rleFrString.
    """
    if not text or not text.isascii():
        raise BadRecordError(_COUNTS_REASON, text)
    digits = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if digits.min() < 0 or digits.max() > 63 or digits[-1] & 0x20:
        raise BadRecordError(_COUNTS_REASON, text)
    last = np.flatnonzero(digits & 0x20 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    num_digits = last - first + 1
    if num_digits.max() > 6:  # 30 bits: more than any picture that is let in
        raise BadRecordError(_COUNTS_REASON, text)
    place = np.arange(digits.size) - np.repeat(first, num_digits)
    runs = np.add.reduceat((digits & 0x1F) << (5 * place), first)
    runs -= np.where(digits[last] & 0x10, 1 << (5 * num_digits), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs.tolist()


def _check_runs(runs: list[int], *, num_pixels: int) -> None:
    if min(runs) < 0 or sum(runs) != num_pixels:
        raise BadRecordError(
            "the runs of an RLE must be >= 0 and add up to height x width of its picture",
            (min(runs), sum(runs)),
        )


def _fields(row: object) -> Mapping[str, object]:
    if not isinstance(row, dict):
        raise BadRecordError("a row must be a json object", row)
    return row


def _integer(fields: Mapping[str, object], key: str, *, low: int, high: int) -> int:
    value = fields.get(key)
    if type(value) is not int or not low <= value <= high:  # True is an int by isinstance
        raise BadRecordError(f'"{key}" must be an integer in [{low}, {high}]', value)
    return value


def _words(fields: Mapping[str, object], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip() or not _is_unicode(value):
        raise BadRecordError(f'"{key}" must be a text that is not blank', value)
    return value.strip()


def _file_name(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value or not _is_unicode(value):
        raise BadRecordError('"file_name" must be a text that is not empty', value)
    path = PurePosixPath(value)
    if (
        path.is_absolute()
        or ".." in path.parts
        or not path.name
        or "\\" in value
        or re.match("[A-Za-z]:", value)
    ):
        raise BadRecordError('"file_name" must be a relative path below --image_dir', value)
    return path.as_posix()


def _is_unicode(text: str) -> bool:
    """Tell text from lone surrogates, which json may hold and neither files nor tokenizers take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
