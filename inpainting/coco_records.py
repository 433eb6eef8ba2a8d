"""Reading COCO's json files row by row, and deciding which rows can be used.

Everything that comes from a file is checked here, before pycocotools sees it: its C code trusts
its input (a NaN in a polygon takes all memory, run lengths that fall short show uninitialised
memory). A bad row raises `BadRecordError`, which the index counts; a file that is not what its flag
promises raises one line for the user.

Terms: a *table* is one list of the file ("images", "annotations", "categories"), a *row* is one
entry of it. *RLE* are run lengths, column by column, beginning with a run of zeros; COCO knows them
as a list of integers and as *compressed* text, pycocotools' own form, which is the one kept.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

import numpy as np
from pycocotools import mask as coco_mask

MAX_ID = 2**63 - 1  # ids are stored as int64 and seed the samples' generators
MAX_SIDE_PX = 65_535  # JPEG's limit
MAX_PICTURE_PX = 178_956_970  # Pillow refuses larger ones as decompression bombs
# pycocotools walks along the whole outline in fifths of a pixel, 16 bytes a step; outlines of real
# objects have some thousand pixels.
MAX_OUTLINE_PX = 1_000_000

_BLANK = re.compile(r"[ \t\n\r]*")
_COUNTS_REASON = 'the "counts" of an RLE must be integers or compressed text'
_FOREIGN_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer. Fetch the file itself with `git lfs pull`."),
    (b"<", "an HTML or XML page. Download the file again."),
    (b"\x1f\x8b", "a gzip archive. Unpack it first."),
    (b"PK\x03\x04", "a zip archive. Unpack it first."),
)


class BadRecordError(ValueError):
    """One row that cannot be used.

    Attributes:
        reason: what must hold; the same words for every row of this kind.
    """

    def __init__(self, reason: str, got: object) -> None:
        super().__init__(f"{reason}, got {reprlib.repr(got)}")
        self.reason = reason


@dataclass(frozen=True)
class Problem:
    """One kind of fault: how many rows were left out for it, and the first of them in words."""

    count: int
    examples: tuple[str, ...]


@dataclass
class ProblemLog:
    """The rows that were left out, by kind."""

    num_examples: int = 5
    kinds: dict[str, Problem] = field(default_factory=dict)

    def add(self, table: str, row: str, error: BadRecordError) -> None:
        """Count one row of a table as left out; `row` names it in the example."""
        kind = f"{table}: {error.reason}"
        seen = self.kinds.get(kind, Problem(count=0, examples=()))
        examples = seen.examples
        if len(examples) < self.num_examples:
            examples = (*examples, f"{row}: {error}")
        self.kinds[kind] = Problem(count=seen.count + 1, examples=examples)


class JsonTables:
    """One COCO json, whose tables are read row by row.

    The file's text is held, but never all of its Python objects: those of COCO's 448 MB would be
    some gigabytes. Each table is decoded once where the file has them in the order of reading.
    """

    def __init__(self, path: Path, *, flag: str) -> None:
        """Read the file and check that it can be a COCO json.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else than a json object.
        """
        self._path = path
        self._flag = flag
        self._text = _read_text(path, flag=flag)
        self._decode = json.JSONDecoder().raw_decode
        self._starts: dict[str, int] = {}  # where the value of each key met so far begins
        self._ends: dict[int, int] = {}  # where the value that begins here ends
        self._last_start = -1
        self._first = self._skip_blank(0)
        if self._mark(self._first) == "[":
            raise self.foreign("a bare list, as of detection results")
        if self._mark(self._first) != "{":
            raise self.foreign("something else than a json object")

    def foreign(self, what: str) -> ValueError:
        """Return the error that says what the file is instead of what its flag promises."""
        kind = "captions" if self._flag == "--caption_file" else "instances"
        return ValueError(
            f"{self._flag} must be a COCO {kind} json, got {what}: {self._path}. "
            f"Name a file like {kind}_train2017.json."
        )

    def has(self, table: str) -> bool:
        """Tell whether the file has this table; walks on through the file to find it."""
        while table not in self._starts:
            if not self._step():
                return False
        return True

    def rows(self, table: str) -> Iterator[object]:
        """Yield the rows of one table, each decoded when it is asked for.

        Raises:
            ValueError: if the file has no such table, or breaks off.
        """
        if not self.has(table):
            raise self.foreign(f'a json without "{table}"')
        start = self._starts[table]
        if self._mark(start) != "[":
            raise self.foreign(f'a json whose "{table}" is not a list')
        yield from self._rows_from(start)

    def finish(self) -> None:
        """Walk to the end of the file, so that one that was cut off is noticed.

        Raises:
            ValueError: if the file breaks off.
        """
        while self._step():
            pass

    def _step(self) -> bool:
        """Walk over the value of the last key to the value of the next; False at the end."""
        if self._last_start < 0:
            at = self._skip_blank(self._first + 1)
        else:
            at = self._skip_blank(self._end_of(self._last_start))
        if self._mark(at) == "}":
            return False
        if self._last_start >= 0:
            at = self._after(at, ",")
        key, at = self._value(at)
        self._last_start = self._after(self._skip_blank(at), ":")
        self._starts[str(key)] = self._last_start
        return True

    def _end_of(self, start: int) -> int:
        if start not in self._ends:
            if self._mark(start) == "[":
                for _ in self._rows_from(start):
                    pass
            else:
                self._ends[start] = self._value(start)[1]
        return self._ends[start]

    def _rows_from(self, start: int) -> Iterator[object]:
        at = self._skip_blank(start + 1)
        if self._mark(at) != "]":
            while True:
                row, at = self._value(at)
                yield row
                at = self._skip_blank(at)
                if self._mark(at) == "]":
                    break
                at = self._after(at, ",")
        self._ends[start] = at + 1

    def _value(self, at: int) -> tuple[object, int]:
        try:
            return self._decode(self._text, at)
        except (ValueError, RecursionError) as error:  # also integers of thousands of digits
            raise self._broken(getattr(error, "pos", at)) from error

    def _after(self, at: int, mark: str) -> int:
        if self._mark(at) != mark:
            raise self._broken(at)
        return self._skip_blank(at + 1)

    def _mark(self, at: int) -> str:
        return self._text[at : at + 1]

    def _skip_blank(self, at: int) -> int:
        match = _BLANK.match(self._text, at)
        assert match is not None
        return match.end()

    def _broken(self, at: int) -> ValueError:
        return ValueError(
            f"{self._flag} must be a whole json file, got {self._path}, which goes wrong or breaks "
            f"off at character {at} of {len(self._text)}. Download or export it again."
        )


def _read_text(path: Path, *, flag: str) -> str:
    """Return the text of a json file, in whichever Unicode encoding it is."""
    if not path.is_file():
        raise FileNotFoundError(f"{flag} must name a file, got {path}. Check the path.")
    data = path.read_bytes()
    for start, what in _FOREIGN_STARTS:
        if data.startswith(start):
            raise ValueError(f"{flag} must be a json file, got {path}, which is {what}")
    if not data.strip():
        raise ValueError(
            f"{flag} must be a json file, got {path}, which is empty. Download it again."
        )
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{flag} must be a json file, got {path}, which is not text ({error.reason} at byte "
            f"{error.start}). Download it again."
        ) from error


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
