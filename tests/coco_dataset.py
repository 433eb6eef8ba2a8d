"""A small COCO data set on disk, whose json files a test may change before it is indexed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inpainting.coco import CocoIndex

HEIGHT, WIDTH = 6, 8
SQUARE = [[1, 1, 5, 1, 5, 4, 1, 4]]
UNCOMPRESSED = {"size": [HEIGHT, WIDTH], "counts": [7, 3, 3, 3, 32]}

Json = dict[str, Any]


def instances() -> Json:
    """Two pictures: id 9 with a dog, a cat and a crowd of cats; id 4 with nothing."""
    return {
        "images": [
            {"id": 9, "file_name": "b.jpg", "height": HEIGHT, "width": WIDTH},
            {"id": 4, "file_name": "sub/a.jpg", "height": 3, "width": 5},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 18, "iscrowd": 0, "segmentation": SQUARE},
            {"id": 2, "image_id": 9, "category_id": 17, "iscrowd": 0, "segmentation": UNCOMPRESSED},
            {
                "id": 3,
                "image_id": 9,
                "category_id": 17,
                "iscrowd": 1,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 48]},
            },
        ],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
    }


def captions() -> Json:
    return {
        "images": instances()["images"],
        "annotations": [
            {"id": 1, "image_id": 9, "caption": " A dog. \n"},
            {"id": 2, "image_id": 4, "caption": "空の部屋 \U0001f600"},
            {"id": 3, "image_id": 9, "caption": "A cat."},
        ],
    }


class Dataset:
    """A data set on disk; json may be changed before the index is built."""

    def __init__(self, folder: Path) -> None:
        self.image_dir = folder / "images"
        self.ann_file = folder / "instances.json"
        self.caption_file = folder / "captions.json"
        self.cache_dir = folder / "cache"
        (self.image_dir / "sub").mkdir(parents=True)
        for name in ("b.jpg", "sub/a.jpg"):
            (self.image_dir / name).touch()
        self.ann_file.write_text(json.dumps(instances()))
        self.caption_file.write_text(json.dumps(captions()))

    def index(self, content: Json | None = None) -> CocoIndex:
        if content is not None:
            self.ann_file.write_text(json.dumps(content))
        return CocoIndex.from_annotations(
            self.image_dir,
            ann_file=self.ann_file,
            caption_file=self.caption_file,
            cache_dir=self.cache_dir,
        )

    def folder_index(self, *, caption_file: Path | None = None) -> CocoIndex:
        return CocoIndex.from_folder(
            self.image_dir, caption_file=caption_file, cache_dir=self.cache_dir
        )


def counts_of(index: CocoIndex) -> dict[str, int]:
    return {kind: problem.count for kind, problem in index.problems.items()}
