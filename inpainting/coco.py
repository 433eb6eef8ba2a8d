"""The index of the training pictures: COCO's records as arrays that all processes share.

pycocotools keeps a record as a handful of Python objects: gigabytes for COCO, once per process, and
copied page by page into every loader worker. Here the json is read once, checked, and written as a
few arrays into a cache folder; every process maps those, so that a loader worker is sent two paths.

Terms: a *row* is the position of a picture in the index, which is ordered by image id. A *record*
is one object of a picture. *Ragged* data (names, masks, captions) lie end to end in one array, with
another one that says where each begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, TypedDict, cast

import numpy as np
from pycocotools import mask as coco_mask

from inpainting.coco_records import (
    BadRecordError,
    InstanceRecord,
    JsonTables,
    Picture,
    Problem,
    ProblemLog,
    parse_caption,
    parse_category,
    parse_instance,
    parse_picture,
)

FORMAT_VERSION = 1  # of the cache: raise it with every change of what is stored
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

_COCO_STEM = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})")
_META_NAME = "meta.json"
_BUILDING_PREFIX = ".building-"
_ABANDONED_AFTER_S = 24 * 3600.0


class Rle(TypedDict):
    """The mask of one object as pycocotools takes it."""

    size: list[int]  # [height, width]
    counts: bytes  # compressed run lengths


class CocoIndex:
    """Pictures, object masks, category names and captions, by row.

    Attributes:
        image_dir: what the file names are relative to.
        problems: by kind of fault, the rows that were left out.
        num_rows_read: by table, how many rows there were, the bad ones included.
    """

    def __init__(self, folder: Path, *, image_dir: Path) -> None:
        """Map the arrays of one cache folder, which `from_annotations` or `from_folder` made.

        Raises:
            OSError, EOFError, ValueError, KeyError, TypeError: if the folder is not whole.
        """
        self._folder = folder
        self.image_dir = image_dir
        meta = json.loads((folder / _META_NAME).read_text(encoding="utf-8"))
        # np.asarray: the same mapped memory, without the bookkeeping of np.memmap at each access.
        self._arrays: dict[str, np.ndarray] = {
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
            for name in meta["arrays"]
        }
        self._category_names: list[str] = meta["category_names"]
        self._folder_times: dict[str, int] = meta["folder_times"]
        self.num_rows_read: dict[str, int] = meta["num_rows_read"]
        self.problems = {
            kind: Problem(count=problem["count"], examples=tuple(problem["examples"]))
            for kind, problem in meta["problems"].items()
        }

    @classmethod
    def from_annotations(
        cls,
        image_dir: Path,
        *,
        ann_file: Path,
        caption_file: Path | None = None,
        cache_dir: Path,
    ) -> CocoIndex:
        """Index the pictures that an instances json lists and that are there.

        Args:
            image_dir: the folder that the json's file names are relative to.
            ann_file: COCO instances json.
            caption_file: COCO captions json of the same pictures.
            cache_dir: where the arrays are kept, made where it is missing. What is written there
                belongs to one state of the json files and picture folders and is never changed.

        Raises:
            FileNotFoundError: if a file, or every single picture, is missing.
            ValueError: if a file is not what its flag promises.
        """
        return _find_or_build(image_dir, ann_file, caption_file, cache_dir)

    @classmethod
    def from_folder(
        cls, image_dir: Path, *, caption_file: Path | None = None, cache_dir: Path
    ) -> CocoIndex:
        """Index every picture file below a folder, without objects and sizes.

        The id of a picture is the number in a COCO-style name (000000000009.jpg,
        COCO_train2014_000000000009.jpg), else, or where two have the same, a hash of its relative
        path. Captions are matched by file name, else by that id. Hidden files are passed over;
        links are followed.

        Args:
            image_dir: the folder.
            caption_file: COCO captions json.
            cache_dir: as in `from_annotations`.

        Raises:
            FileNotFoundError: if there is no picture, or no caption file.
            ValueError: if the caption file is not one.
        """
        return _find_or_build(image_dir, None, caption_file, cache_dir)

    def __len__(self) -> int:
        return len(self._arrays["image_ids"])

    def __getstate__(self) -> dict[str, Path]:
        return {"folder": self._folder, "image_dir": self.image_dir}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["folder"], image_dir=state["image_dir"])

    @property
    def image_ids(self) -> np.ndarray:
        """The id of each row: (N,) int64, ascending, read-only."""
        return self._arrays["image_ids"]

    def image_path(self, row: int) -> Path:
        """Return where the picture lies."""
        return self.image_dir / os.fsdecode(self._ragged("name", row))

    def size(self, row: int) -> tuple[int, int]:
        """Return (height, width) in pixels as recorded, (0, 0) where nothing is."""
        height, width = self._arrays["sizes"][row].tolist()
        return height, width

    def object_masks(self, row: int) -> list[Rle]:
        """Return the masks of the picture's single objects (no crowds), in the json's order."""
        size = list(self.size(row))
        return [
            Rle(size=size, counts=self._ragged("rle", record))
            for record in self._range("record", row)
            if not self._arrays["is_crowd"][record]
        ]

    @staticmethod
    def decode(rle: Rle) -> np.ndarray:
        """Draw one mask: (height, width) uint8, 1 = object, 0 = elsewhere."""
        return coco_mask.decode(cast(Any, rle))

    def category_names(self, row: int) -> list[str]:
        """Return the distinct names of what the picture shows, the largest total area first."""
        records = self._range("record", row)
        part = slice(records.start, records.stop)
        areas = np.bincount(self._arrays["category"][part], self._arrays["area_px"][part])
        largest_first = np.argsort(-areas, kind="stable")
        return [self._category_names[i] for i in largest_first if areas[i] > 0]

    def captions(self, row: int) -> list[str]:
        """Return the picture's captions, stripped, in the json's order."""
        captions = self._range("caption", row)
        return [self._ragged("caption_text", caption).decode() for caption in captions]

    def is_fresh(self) -> bool:
        """Tell whether no file was added to or taken from the picture folders since the build."""
        return self._folder_times == {
            folder: _modified_ns(self.image_dir / folder) for folder in self._folder_times
        }

    def _range(self, kind: str, row: int) -> range:
        starts = self._arrays[f"{kind}_starts"]
        return range(int(starts[row]), int(starts[row + 1]))

    def _ragged(self, kind: str, position: int) -> bytes:
        part = self._range(kind, position)
        return self._arrays[f"{kind}_bytes"][part.start : part.stop].tobytes()


class _Contents(TypedDict):
    """What an index is made of, before it is written."""

    arrays: dict[str, np.ndarray]
    category_names: list[str]
    folder_times: dict[str, int]  # relative folder -> time of its last change in ns
    num_rows_read: dict[str, int]
    problems: dict[str, Problem]


class _Builder:
    """Reads pictures, records and captions, in this order, and packs them into arrays."""

    def __init__(self, image_dir: Path) -> None:
        self.image_dir = image_dir
        self.pictures: dict[int, Picture | None] = {}  # None: listed, but left out
        self.records: list[InstanceRecord] = []
        self.captions: list[tuple[int, str]] = []
        self.category_names: list[str] = []
        self.category_of_id: dict[int, int] = {}
        self.folder_times: dict[str, int] = {}
        self.num_rows_read: dict[str, int] = {}
        self.problems = ProblemLog()

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
                if named.get("file_name") in id_of_name and type(named.get("id")) is int:
                    ids_here[named["id"]] = id_of_name[named["file_name"]]
        for number, row in self._numbered(tables, "annotations", counted_as="captions"):
            if number == 0 and _has_only(row, "segmentation", other="caption"):
                raise tables.foreign("an instances json")
            try:
                image_id, text = parse_caption(row)
                image_id = ids_here.get(image_id, image_id)
                if image_id not in self.pictures:
                    raise BadRecordError('"image_id" must be one of the data set\'s', image_id)
                if self.pictures[image_id] is not None:
                    self.captions.append((image_id, text))
            except BadRecordError as error:
                self._leave_out("captions", number, row, error)
        if not self.captions:
            raise tables.foreign("no caption of any picture of this data set")

    def pack(self) -> _Contents:
        """Return everything as arrays, pictures ordered by id."""
        pictures = sorted(picture for picture in self.pictures.values() if picture)
        image_ids = np.array([picture.image_id for picture in pictures], dtype=np.int64)
        record_order, record_starts = _by_picture([r.image_id for r in self.records], image_ids)
        caption_order, caption_starts = _by_picture([c[0] for c in self.captions], image_ids)
        records = [self.records[i] for i in record_order]
        arrays = {
            "image_ids": image_ids,
            "sizes": np.array([(p.height, p.width) for p in pictures], dtype=np.int32),
            "record_starts": record_starts,
            "category": np.array(
                [self.category_of_id[r.category_id] for r in records], dtype=np.int32
            ),
            "area_px": np.array([r.area_px for r in records], dtype=np.int64),
            "is_crowd": np.array([r.is_crowd for r in records], dtype=np.bool_),
            "caption_starts": caption_starts,
        }
        ragged = {
            "name": [os.fsencode(picture.file_name) for picture in pictures],
            "rle": [record.counts for record in records],
            "caption_text": [self.captions[i][1].encode() for i in caption_order],
        }
        for kind, parts in ragged.items():
            arrays[f"{kind}_bytes"] = np.frombuffer(b"".join(parts), dtype=np.uint8)
            arrays[f"{kind}_starts"] = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return _Contents(
            arrays=arrays,
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
            self.folder_times[folder] = _modified_ns(self.image_dir / folder)
        return os.path.isfile(f"{self.image_dir}/{file_name}")  # noqa: PTH113 - 118,287 times


def _find_or_build(
    image_dir: Path, ann_file: Path | None, caption_file: Path | None, cache_dir: Path
) -> CocoIndex:
    """Return the index from the cache, built first where there is none or a stale or torn one."""
    sources: list[list[object]] = []
    for flag, path in (("--ann_file", ann_file), ("--caption_file", caption_file)):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{flag} must name a file, got {path}. Check the path.")
        if path is not None:
            status = path.stat()
            sources.append([flag, str(path.resolve()), status.st_size, status.st_mtime_ns])
    address = json.dumps([FORMAT_VERSION, str(image_dir.resolve()), sources])
    key = hashlib.sha256(address.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    cache_dir.mkdir(parents=True, exist_ok=True)  # before the picture folders' times are read
    for folder in sorted(cache_dir.glob(f"{key}-*")):
        index = _open_whole(folder, image_dir=image_dir)
        if index is not None and index.is_fresh():
            return index
    contents = _build(image_dir, ann_file=ann_file, caption_file=caption_file)
    folder = _publish(contents, key=key, cache_dir=cache_dir)
    return CocoIndex(folder, image_dir=image_dir)


def _build(image_dir: Path, *, ann_file: Path | None, caption_file: Path | None) -> _Contents:
    builder = _Builder(image_dir)
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


def _open_whole(folder: Path, *, image_dir: Path) -> CocoIndex | None:
    """Open a cache folder; None where something is missing or cut off."""
    try:
        return CocoIndex(folder, image_dir=image_dir)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def _publish(contents: _Contents, *, key: str, cache_dir: Path) -> Path:
    """Write a cache folder whole or not at all, and return it.

    Its name says which pictures it holds, so that one built twice (by two processes, or because a
    folder's time changed without its pictures) lies there once.
    """
    for abandoned in cache_dir.glob(f"{_BUILDING_PREFIX}*"):
        if time.time() - abandoned.stat().st_mtime > _ABANDONED_AFTER_S:
            shutil.rmtree(abandoned, ignore_errors=True)
    names = hashlib.sha256(contents["arrays"]["name_bytes"].tobytes()).hexdigest()[:16]
    target = cache_dir / f"{key}-{names}"
    building = Path(tempfile.mkdtemp(prefix=_BUILDING_PREFIX, dir=cache_dir))
    try:
        for name, values in contents["arrays"].items():
            with (building / f"{name}.npy").open("wb") as file:
                np.save(file, values)
                _flush(file)
        problems = {kind: asdict(problem) for kind, problem in contents["problems"].items()}
        meta = {**contents, "arrays": list(contents["arrays"]), "problems": problems}
        with (building / _META_NAME).open("w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            _flush(file)
        building.chmod(0o755)  # mkdtemp's is for one user alone
        if _open_whole(target, image_dir=Path()) is not None:
            (building / _META_NAME).replace(target / _META_NAME)  # with the folders' new times
            return target
        if target.exists():  # torn: out of the way
            target.rename(building / "torn")
        try:
            building.rename(target)
        except OSError:
            if _open_whole(target, image_dir=Path()) is None:
                raise  # not another process that was faster
    finally:
        shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(target / "torn", ignore_errors=True)
    return target


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


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


def _modified_ns(folder: Path) -> int:
    """Return when entries of a folder last changed; -1 where there is no such folder."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


def _path_hash(name: str) -> int:
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: fits int64, not negative
