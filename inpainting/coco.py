"""The index of the training pictures: COCO's records as arrays that all processes share.

pycocotools keeps a record as a handful of Python objects: gigabytes for COCO, once per process, and
copied page by page into every loader worker. Here the arrays that `coco_build` makes of the json
are written into a cache folder once; every process maps those, so that a loader worker is sent two
paths. This file decides how the arrays are read, and when they are built again.

Terms: a *row* is the position of a picture in the index, which is ordered by image id. A *record*
is one object of a picture. A cache folder is *fresh* while the picture folders are as they were,
*torn* where one of its files is missing or cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from inpainting.atomic import alone_in, sync
from inpainting.coco_build import (
    Contents,
    build_contents,
    modified_ns,
    unpack_captions,
    unpack_masks,
)
from inpainting.coco_records import Problem
from inpainting.images import open_image

FORMAT_VERSION = 2  # of the cache: raise it with every change of what is stored

_META_NAME = "meta.json"
_BUILDING_PREFIX = ".building-"
_ABANDONED_AFTER_S = 24 * 3600.0
_NUM_KEPT = 4  # indexes of other data sets or of earlier states: COCO's has 150 MB


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
        self._fingerprint: str = meta["fingerprint"]
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
        on_problem: Callable[[str, str], None] | None = None,
    ) -> CocoIndex:
        """Index the pictures that an instances json lists and that are there.

        Args:
            image_dir: the folder that the json's file names are relative to.
            ann_file: COCO instances json.
            caption_file: COCO captions json of the same pictures.
            cache_dir: where the arrays are kept, made where it is missing. What is written there
                belongs to one state of the json files and picture folders and is never changed.
            on_problem: is told the kind and the words of every row that is left out; for that the
                files are read again, whatever the cache holds.

        Raises:
            FileNotFoundError: if a file, or every single picture, is missing.
            ValueError: if a file is not what its flag promises.
        """
        return _find_or_build(image_dir, ann_file, caption_file, cache_dir, on_problem)

    @classmethod
    def from_folder(
        cls,
        image_dir: Path,
        *,
        caption_file: Path | None = None,
        cache_dir: Path,
        on_problem: Callable[[str, str], None] | None = None,
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
            on_problem: likewise.

        Raises:
            FileNotFoundError: if there is no picture, or no caption file.
            ValueError: if the caption file is not one.
        """
        return _find_or_build(image_dir, None, caption_file, cache_dir, on_problem)

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

    def open_picture(self, row: int) -> Image.Image:
        """Open the picture, upright and RGB, and see that the record's masks belong to it.

        Raises:
            ValueError, FileNotFoundError: as `open_image`, or it has another size than recorded.
            OSError: the disk's fault.
        """
        picture = open_image(self.image_path(row))
        height, width = self.size(row)
        if height and (width, height) != picture.size:
            raise ValueError(
                f"{self.image_path(row)} must have the size in its record, got {picture.size[0]} x "
                f"{picture.size[1]} px for {width} x {height}: its masks don't belong to it."
            )
        return picture

    def object_masks(self, row: int) -> list[Rle]:
        """Return the masks of the picture's single objects (no crowds), in the json's order."""
        size = list(self.size(row))
        return [Rle(size=size, counts=c) for c in unpack_masks(self._ragged("masks", row))]

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
        return unpack_captions(self._ragged("captions", row))

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with every record that is kept."""
        return self._fingerprint

    def is_fresh(self) -> bool:
        """Tell whether no file was added to or taken from the picture folders since the build."""
        return self._folder_times == {
            folder: modified_ns(self.image_dir / folder) for folder in self._folder_times
        }

    def _range(self, kind: str, row: int) -> range:
        starts = self._arrays[f"{kind}_starts"]
        return range(int(starts[row]), int(starts[row + 1]))

    def _ragged(self, kind: str, position: int) -> bytes:
        part = self._range(kind, position)
        return self._arrays[f"{kind}_bytes"][part.start : part.stop].tobytes()


def _find_or_build(
    image_dir: Path,
    ann_file: Path | None,
    caption_file: Path | None,
    cache_dir: Path,
    on_problem: Callable[[str, str], None] | None,
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
    index = None
    if on_problem is None:
        index = _find_fresh(image_dir, key=key, cache_dir=cache_dir)
    if index is not None:
        return index
    with alone_in(cache_dir):  # all ranks of a run come here at once, with half a gigabyte each
        if on_problem is None:  # built while this one waited
            index = _find_fresh(image_dir, key=key, cache_dir=cache_dir)
        if index is None:
            contents = build_contents(
                image_dir, ann_file=ann_file, caption_file=caption_file, on_problem=on_problem
            )
            folder = _publish(contents, key=key, cache_dir=cache_dir)
            index = CocoIndex(folder, image_dir=image_dir)
            _prune(cache_dir, in_use=folder)
    return index


def _find_fresh(image_dir: Path, *, key: str, cache_dir: Path) -> CocoIndex | None:
    """Return the index of these files if it is in the cache, and note that it was used."""
    for folder in sorted(cache_dir.glob(f"{key}-*")):
        index = _open_whole(folder, image_dir=image_dir)
        if index is not None and index.is_fresh():
            with suppress(OSError):  # somebody else's cache
                os.utime(folder)
            return index
    return None


def _prune(cache_dir: Path, *, in_use: Path) -> None:
    """Remove all but the indexes that were used last; none of the last day's runs may need it."""
    used = {
        folder: folder.stat().st_mtime
        for folder in cache_dir.iterdir()
        if folder != in_use and not folder.name.startswith(".")
    }
    newest_first = sorted(used, key=lambda folder: used[folder], reverse=True)
    for folder in newest_first[_NUM_KEPT - 1 :]:
        if time.time() - used[folder] > _ABANDONED_AFTER_S:
            shutil.rmtree(folder, ignore_errors=True)


def _open_whole(folder: Path, *, image_dir: Path) -> CocoIndex | None:
    """Open a cache folder; None where something is missing or cut off."""
    try:
        return CocoIndex(folder, image_dir=image_dir)
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None


def _publish(contents: Contents, *, key: str, cache_dir: Path) -> Path:
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
            np.save(building / f"{name}.npy", values)
            sync(building / f"{name}.npy")
        problems = {kind: asdict(problem) for kind, problem in contents["problems"].items()}
        meta = {**contents, "arrays": list(contents["arrays"]), "problems": problems}
        (building / _META_NAME).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        sync(building / _META_NAME)
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
