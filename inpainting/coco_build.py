"""Building the index: from the checked rows of the json files, or a folder, to arrays.

A row that cannot be used is left out and counted, and its picture's other rows stay; a file without
one usable picture, or caption, is refused in one line.

Terms: *contents* are what an index is made of, before they are written. A row is *left out* where
it is bad itself; what belongs to a picture that was left out goes with it, uncounted. *Ragged* data
lie end to end in one array, with another one that says where each begins. A picture's masks and its
captions are each *packed* into one compressed piece: that halves COCO's index.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import numpy as np

from inpainting.coco_json import JsonTables
from inpainting.coco_records import (
    UNUSED_CAPTION,
    BadRecordError,
    InstanceRecord,
    Picture,
    Problem,
    ProblemLog,
    parse_caption,
    parse_category,
    parse_instance,
    parse_picture,
)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

_BETWEEN_MASKS = b"\n"  # no character of a compressed RLE
_COCO_STEM = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})")


class Contents(TypedDict):
    """What an index is made of; a change of its form raises `coco.FORMAT_VERSION`."""

    arrays: dict[str, np.ndarray]
    fingerprint: str  # 16 hexadecimal digits, of everything before it is packed
    category_names: list[str]
    folder_times: dict[str, int]  # relative folder -> time of its last change in ns
    num_rows_read: dict[str, int]
    problems: dict[str, Problem]


def build_contents(
    image_dir: Path,
    *,
    ann_file: Path | None,
    caption_file: Path | None,
    on_problem: Callable[[str, str], None] | None = None,
) -> Contents:
    """Read what an index is made of.

    Args:
        image_dir: the folder of the pictures.
        ann_file: COCO instances json; None takes every picture file below the folder.
        caption_file: COCO captions json.
        on_problem: is told the kind and the words of every row that is left out.

    Raises:
        FileNotFoundError: if a file, or every single picture, is missing.
        ValueError: if a file is not what its flag promises.
    """
    builder = _Builder(image_dir, problems=ProblemLog(on_problem=on_problem))
    if ann_file is None:
        builder.list_folder()
    else:
        tables = JsonTables(ann_file, flag="--ann_file")
        builder.read_pictures(tables)
        builder.read_records(tables)
        builder.read_categories(tables)
        tables.finish()
        del tables  # half a gigabyte of text
    if caption_file is not None:
        tables = JsonTables(caption_file, flag="--caption_file")
        builder.read_captions(tables, match_file_names=ann_file is None)
        tables.finish()
    return builder.pack()


def unpack_masks(packed: bytes) -> list[bytes]:
    """Return the compressed RLEs of a picture's single objects, as pycocotools takes them."""
    joined = zlib.decompress(packed)
    return joined.split(_BETWEEN_MASKS) if joined else []


def unpack_captions(packed: bytes) -> list[str]:
    """Return a picture's captions."""
    return json.loads(zlib.decompress(packed))


def modified_ns(folder: Path) -> int:
    """Return when entries of a folder last changed; -1 where there is no such folder."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


class _Builder:
    """Reads pictures, records and captions, in this order, and packs them into arrays."""

    def __init__(self, image_dir: Path, *, problems: ProblemLog) -> None:
        self.image_dir = image_dir
        self.problems = problems
        self.pictures: dict[int, Picture | None] = {}  # None: listed, but left out
        self.records: list[InstanceRecord] = []
        self.captions: list[tuple[int, str]] = []
        self.category_names: list[str] = []
        self.category_of_id: dict[int, int] = {}
        self.folder_times: dict[str, int] = {}
        self.num_rows_read: dict[str, int] = {}

    def list_folder(self) -> None:
        """Take every picture file below the folder."""
        names: list[str] = []
        seen: set[tuple[int, int]] = set()  # a link may lead back up
        for folder, subfolders, files in os.walk(self.image_dir, followlinks=True):
            status = os.stat(folder)  # noqa: PTH116 - os.walk yields text
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            relative = Path(folder).relative_to(self.image_dir)
            self.folder_times[relative.as_posix()] = status.st_mtime_ns
            names += [
                (relative / name).as_posix()
                for name in files
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
            ]
        if not names:
            raise FileNotFoundError(
                f"--image_dir must hold pictures ({', '.join(IMAGE_SUFFIXES)}), got none below "
                f"{self.image_dir}. Name the folder of the photographs."
            )
        numbers = [_COCO_STEM.fullmatch(Path(name).stem) for name in names]
        ids = [int(match[1]) if match else -1 for match in numbers]
        times_used = Counter(ids)
        for name, number in zip(names, ids, strict=True):
            image_id = number if number >= 0 and times_used[number] == 1 else _path_hash(name)
            assert image_id not in self.pictures
            self.pictures[image_id] = Picture(image_id, name, height=0, width=0)
        self.num_rows_read["images"] = len(names)

    def read_pictures(self, tables: JsonTables) -> None:
        """Take the rows of "images" whose file is there."""
        num_missing = 0
        for number, row in self._numbered(tables, "images"):
            try:
                picture = parse_picture(row)
                if picture.image_id in self.pictures:
                    raise BadRecordError('"id" must not be used twice', picture.image_id)
                self.pictures[picture.image_id] = None
                if not self._is_there(picture.file_name):
                    num_missing += 1
                    raise BadRecordError(
                        '"file_name" must be a file below --image_dir', picture.file_name
                    )
                self.pictures[picture.image_id] = picture
            except BadRecordError as error:
                self._leave_out("images", number, row, error)
                if isinstance(row, dict) and type(row.get("id")) is int:
                    self.pictures.setdefault(row["id"], None)  # its records share its fate
        if not any(self.pictures.values()):
            num_rows = self.num_rows_read["images"]
            first = next((kind.examples[0] for kind in self.problems.kinds.values()), "none listed")
            if num_missing:
                raise FileNotFoundError(
                    f"--image_dir must hold the pictures that --ann_file lists, got none of them "
                    f"({num_rows}; {first}) in {self.image_dir}. Name the folder they lie in."
                )
            raise tables.foreign(f"no usable picture among {num_rows} ({first})")

    def read_records(self, tables: JsonTables) -> None:
        """Take the rows of "annotations" that belong to a picture that was taken."""
        used_ids: set[int] = set()
        for number, row in self._numbered(tables, "annotations"):
            if number == 0 and _has_only(row, "caption", other="segmentation"):
                raise tables.foreign("a captions json")
            try:
                record = parse_instance(row, self.pictures)
                if record is None:
                    continue
                if record.annotation_id in used_ids:
                    raise BadRecordError('"id" must not be used twice', record.annotation_id)
                used_ids.add(record.annotation_id)
                self.records.append(record)
            except BadRecordError as error:
                self._leave_out("annotations", number, row, error)

    def read_categories(self, tables: JsonTables) -> None:
        """Take the names, after the records: that is the file's order; then check the records."""
        for number, row in self._numbered(tables, "categories"):
            try:
                category_id, name = parse_category(row)
                if category_id in self.category_of_id:
                    raise BadRecordError('"id" must not be used twice', category_id)
            except BadRecordError as error:
                self._leave_out("categories", number, row, error)
                continue
            if name not in self.category_names:
                self.category_names.append(name)
            self.category_of_id[category_id] = self.category_names.index(name)
        usable = []
        for record in self.records:
            if record.category_id in self.category_of_id:
                usable.append(record)
            else:
                error = BadRecordError(
                    '"category_id" must be the id of a row of "categories"', record.category_id
                )
                self.problems.add("annotations", f"id {record.annotation_id}", error)
        self.records = usable

    def read_captions(self, tables: JsonTables, *, match_file_names: bool) -> None:
        """Take the rows of a captions file that belong to a picture that was taken."""
        ids_here: dict[int, int] = {}
        if match_file_names and tables.has("images"):
            id_of_name = {p.file_name: p.image_id for p in self.pictures.values() if p}
            for row in tables.rows("images"):
                named = row if isinstance(row, dict) else {}
                number, name = named.get("id"), named.get("file_name")
                if type(number) is int and isinstance(name, str) and name in id_of_name:
                    ids_here[number] = id_of_name[name]
        for number, row in self._numbered(tables, "annotations", counted_as="captions"):
            if number == 0 and _has_only(row, "segmentation", other="caption"):
                raise tables.foreign("an instances json")
            try:
                image_id, text = parse_caption(row)
                image_id = ids_here.get(image_id, image_id)
                if image_id not in self.pictures:
                    raise BadRecordError(UNUSED_CAPTION, image_id)
                if self.pictures[image_id] is not None:
                    self.captions.append((image_id, text))
            except BadRecordError as error:
                self._leave_out("captions", number, row, error)
        if not self.captions:
            raise tables.foreign("no caption of any picture of this data set")

    def pack(self) -> Contents:
        """Return everything as arrays, pictures ordered by id."""
        pictures = sorted(picture for picture in self.pictures.values() if picture)
        image_ids = np.array([picture.image_id for picture in pictures], dtype=np.int64)
        record_order, record_starts = _by_picture([r.image_id for r in self.records], image_ids)
        caption_order, caption_starts = _by_picture([c[0] for c in self.captions], image_ids)
        records = [self.records[i] for i in record_order]
        captions = [self.captions[i][1] for i in caption_order]
        arrays = {
            "image_ids": image_ids,
            "sizes": np.array([(p.height, p.width) for p in pictures], dtype=np.int32),
            "record_starts": record_starts,
            "category": np.array(
                [self.category_of_id[r.category_id] for r in records], dtype=np.int32
            ),
            "area_px": np.array([r.area_px for r in records], dtype=np.int32),
        }
        digest = hashlib.blake2b("\0".join(self.category_names).encode(), digest_size=8)
        for values in arrays.values():
            digest.update(values.data)

        def pack(parts: list[bytes]) -> list[bytes]:
            for part in parts:
                digest.update(part + b"\0")
            return [zlib.compress(part) for part in parts]

        masks = [
            _BETWEEN_MASKS.join(r.counts for r in records[start:stop] if not r.is_crowd)
            for start, stop in pairwise(record_starts.tolist())
        ]
        texts = [
            json.dumps(captions[start:stop]).encode()
            for start, stop in pairwise(caption_starts.tolist())
        ]
        names = [os.fsencode(picture.file_name) for picture in pictures]
        for kind, parts in (("name", names), ("masks", pack(masks)), ("captions", pack(texts))):
            arrays[f"{kind}_bytes"] = np.frombuffer(b"".join(parts), dtype=np.uint8)
            arrays[f"{kind}_starts"] = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        digest.update(b"\0".join(names))
        return Contents(
            arrays=arrays,
            fingerprint=digest.hexdigest(),
            category_names=self.category_names,
            folder_times=self.folder_times,
            num_rows_read=self.num_rows_read,
            problems=self.problems.kinds,
        )

    def _numbered(
        self, tables: JsonTables, table: str, *, counted_as: str | None = None
    ) -> Iterator[tuple[int, object]]:
        self.num_rows_read[counted_as or table] = 0
        for number, row in enumerate(tables.rows(table)):
            self.num_rows_read[counted_as or table] = number + 1
            yield number, row

    def _leave_out(self, table: str, number: int, row: object, error: BadRecordError) -> None:
        row_id = row.get("id") if isinstance(row, dict) else None
        self.problems.add(table, f"row {number}, id {reprlib.repr(row_id)}", error)

    def _is_there(self, file_name: str) -> bool:
        folder = os.path.dirname(file_name)  # noqa: PTH120 - 118,287 times
        if folder not in self.folder_times:  # before the first look at what is in it
            self.folder_times[folder] = modified_ns(self.image_dir / folder)
        return os.path.isfile(f"{self.image_dir}/{file_name}")  # noqa: PTH113 - 118,287 times


def _has_only(row: object, key: str, *, other: str) -> bool:
    return isinstance(row, dict) and key in row and other not in row


def _by_picture(record_ids: list[int], image_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order records by picture, and by their position within one.

    Args:
        record_ids: the image id of each of R records.
        image_ids: (N,) int64, ascending.

    Returns:
        The order, (R,) int64, and where each picture's records begin in it, (N + 1,) int64.
    """
    ids = np.array(record_ids, dtype=np.int64)
    order = np.argsort(ids, kind="stable")
    return order, np.append(np.searchsorted(ids[order], image_ids), len(ids)).astype(np.int64)


def _path_hash(name: str) -> int:
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: fits int64, not negative
