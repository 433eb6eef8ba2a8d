"""The index of COCO's records: exact masks, no trust in the files, cheap to share."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from inpainting import coco
from inpainting.coco import CocoIndex
from inpainting.coco_records import BadRecordError, compress

REAL_DATA = Path(__file__).parents[2].parent / "shared" / "data"
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


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path)


@pytest.fixture
def forbid_building(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def build(*args: object, **options: object) -> None:
        raise AssertionError("the index was built again")

    return lambda: monkeypatch.setattr(coco, "_build", build)


def counts_of(index: CocoIndex) -> dict[str, int]:
    return {kind: problem.count for kind, problem in index.problems.items()}


# What an index says


def test_rows_are_ordered_by_image_id(dataset: Dataset) -> None:
    index = dataset.index()
    assert index.image_ids.tolist() == [4, 9]
    assert index.image_ids.dtype == np.int64
    assert len(index) == 2
    assert [index.image_path(row) for row in range(2)] == [
        dataset.image_dir / "sub/a.jpg",
        dataset.image_dir / "b.jpg",
    ]
    assert [index.size(row) for row in range(2)] == [(3, 5), (HEIGHT, WIDTH)]
    assert index.problems == {}
    assert index.num_rows_read == {"images": 2, "annotations": 3, "categories": 2, "captions": 3}


def test_crowds_are_no_object_masks(dataset: Dataset) -> None:
    index = dataset.index()
    assert [len(index.object_masks(row)) for row in range(2)] == [0, 2]
    square, runs = (index.decode(rle) for rle in index.object_masks(1))
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[1:4, 1:5] = 1
    np.testing.assert_array_equal(square, expected)
    assert square.dtype == np.uint8
    np.testing.assert_array_equal(np.flatnonzero(runs.T), [7, 8, 9, 13, 14, 15])


def test_category_names_are_distinct_and_the_largest_comes_first(dataset: Dataset) -> None:
    content = instances()
    assert dataset.index(content).category_names(1) == ["cat", "dog"]  # with the crowd: 54 > 12 px
    del content["annotations"][2]
    assert dataset.index(content).category_names(1) == ["dog", "cat"]
    assert dataset.index(content).category_names(0) == []


def test_two_ids_of_one_category_name_are_one_name(dataset: Dataset) -> None:
    content = instances()
    content["categories"][0]["name"] = "dog "
    assert dataset.index(content).category_names(1) == ["dog"]


def test_an_object_without_a_pixel_is_not_named(dataset: Dataset) -> None:
    content = instances()
    content["annotations"] = [content["annotations"][0]]
    content["annotations"][0]["segmentation"] = [[9, 1, 12, 1, 12, 4]]  # beside the picture
    index = dataset.index(content)
    assert index.category_names(1) == []
    assert not index.decode(index.object_masks(1)[0]).any()


def test_captions_are_stripped_and_keep_their_order(dataset: Dataset) -> None:
    index = dataset.index()
    assert index.captions(1) == ["A dog.", "A cat."]
    assert index.captions(0) == ["空の部屋 \U0001f600"]


def test_without_a_captions_file_there_are_no_captions(dataset: Dataset) -> None:
    index = CocoIndex.from_annotations(
        dataset.image_dir, ann_file=dataset.ann_file, cache_dir=dataset.cache_dir
    )
    assert [index.captions(row) for row in range(2)] == [[], []]


def test_the_order_of_the_tables_in_the_file_does_not_matter(dataset: Dataset) -> None:
    content = instances()
    reference = [dict(rle) for rle in dataset.index(content).object_masks(1)]
    turned = {"info": {"a": [1, {"b": "]"}]}, **dict(reversed(content.items())), "empty": []}
    index = dataset.index(turned)
    assert [dict(rle) for rle in index.object_masks(1)] == reference
    assert index.category_names(1) == ["cat", "dog"]


# Masks equal pycocotools'


@pytest.mark.parametrize(
    ("ann_file", "image_folder"),
    [
        ("coco_real/annotations/instances.json", "coco_real/images"),
        ("coco_ci/annotations/instances_train2017.json", "coco_ci/train2017"),
        ("coco_ci/annotations/instances_val2017.json", "coco_ci/val2017"),
    ],
)
def test_real_masks_equal_pycocotools(tmp_path: Path, ann_file: str, image_folder: str) -> None:
    if not (REAL_DATA / ann_file).exists():
        pytest.skip("the real photographs are not here")
    content = json.loads((REAL_DATA / ann_file).read_text())
    reference = COCO()
    reference.dataset = copy.deepcopy(content)
    reference.createIndex()
    for record in content["annotations"]:
        record["iscrowd"] = 0  # so that the index gives out every mask
    (tmp_path / "instances.json").write_text(json.dumps(content))
    index = CocoIndex.from_annotations(
        REAL_DATA / image_folder,
        ann_file=tmp_path / "instances.json",
        cache_dir=tmp_path / "cache",
    )
    assert index.problems == {}
    num_equal = 0
    for row, image_id in enumerate(index.image_ids.tolist()):
        records = reference.imgToAnns[image_id]
        for rle, record in zip(index.object_masks(row), records, strict=True):
            expected = reference.annToMask(record)
            mask = index.decode(rle)
            assert mask.dtype == expected.dtype
            np.testing.assert_array_equal(mask, expected, err_msg=f"record {record['id']}")
            num_equal += 1
    assert num_equal == len(content["annotations"])


def test_polygon_masks_equal_pycocotools_at_the_border() -> None:
    rng = np.random.default_rng(0)
    reference: Any = COCO()
    reference.imgs = {0: {"height": 37, "width": 53}}
    for _ in range(300):
        polygons = [
            (rng.random(2 * rng.integers(3, 9)) * 80 - 15).round(2).tolist()
            for _ in range(rng.integers(1, 4))
        ]
        expected = reference.annToMask({"image_id": 0, "segmentation": polygons})
        counts = compress(polygons, height=37, width=53)
        np.testing.assert_array_equal(
            coco_mask.decode({"size": [37, 53], "counts": counts}), expected
        )


def test_all_kinds_of_rle_equal_the_mask_that_they_were_made_of() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 0.99, 1.0):
        for height, width in ((1, 1), (1, 50), (211, 173)):
            mask = np.asfortranarray(rng.random((height, width)) < share, dtype=np.uint8)
            text = cast(Any, coco_mask.encode(mask))["counts"].decode()
            before = np.concatenate([[0], mask.ravel(order="F")[:-1]])  # runs begin with zeros
            changes = np.flatnonzero(mask.ravel(order="F") != before)
            runs = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
            for counts in (text, runs):
                rle = {"size": [height, width], "counts": counts}
                kept = compress(rle, height=height, width=width)
                np.testing.assert_array_equal(
                    coco_mask.decode({"size": [height, width], "counts": kept}), mask
                )


# Bad records

NAN, INF = float("nan"), float("inf")


def rle(counts: object, *, size: object = (HEIGHT, WIDTH)) -> Json:
    return {"size": list(size) if isinstance(size, tuple) else size, "counts": counts}


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 1, NAN, 1, 5, 4]], "must be finite"),
        ([[NAN, 1, 5, 1, 5, 4]], "must be finite"),
        ([[1, 1, 5, INF, 5, 4]], "must be finite"),
        ([[1, 1, INF, -INF, 5, 4]], "must be finite"),
        ([[1, 1, 1e9, 1, 5, 4]], "within one picture size"),
        ([[1, 1, 5, 1, 5, -1e9]], "within one picture size"),
        ([[1, 1, 5, 1, 5, 10**400]], "list of numbers"),
        ([[1, 1, 5, 1]], "at least 3 points"),
        ([[1, 1, 5, 1, 5]], "at least 3 points"),
        ([[1, 1, 5, 1, 5, 4, 1]], "at least 3 points"),
        ([SQUARE[0], []], "at least 3 points"),
        (SQUARE[0], "a polygon must be a list of numbers"),
        ([SQUARE], "at least 3 points"),
        ([[SQUARE[0]] * 6], "list of numbers"),
        ([["1", "1", "5", "1", "5", "4"]], "list of numbers"),
        ([[1, 1, None, 1, 5, 4]], "list of numbers"),
        ([None], "list of numbers"),
        ([[0, 0, 8, 6] * 70_000], "outline"),
        ([], "at least one polygon"),
        (None, "list of polygons or an RLE"),
        ("polygon", "list of polygons or an RLE"),
        (7, "list of polygons or an RLE"),
        ({}, '"size"'),
        (rle([48], size=(WIDTH, HEIGHT)), '"size"'),
        (rle([48], size=None), '"size"'),
        (rle([48], size=(HEIGHT, WIDTH, 1)), '"size"'),
        (rle([40]), "add up"),
        (rle([40, 9]), "add up"),
        (rle([50, -2]), "add up"),
        (rle([2**32 + 48]), "add up"),
        (rle([-(10**30), 10**30 + 48]), "add up"),
        (rle([40.0, 8.0]), "integers or compressed text"),
        (rle([True, 47]), "integers or compressed text"),
        (rle(["48"]), "integers or compressed text"),
        (rle([]), "integers or compressed text"),
        (rle(None), "integers or compressed text"),
        (rle(48), "integers or compressed text"),
        (rle(""), "integers or compressed text"),
        (rle("垃圾"), "integers or compressed text"),
        (rle("!!"), "integers or compressed text"),
        (rle("P"), "integers or compressed text"),  # says that another digit follows
        (rle("PPPPPPPPPP0"), "integers or compressed text"),
        (rle("8"), "add up"),
        (rle("OO1"), "add up"),  # -1
    ],
)
def test_what_pycocotools_cannot_be_trusted_with_is_left_out(
    dataset: Dataset, segmentation: object, reason: str
) -> None:
    with pytest.raises(BadRecordError, match=reason):
        compress(segmentation, height=HEIGHT, width=WIDTH)
    content = instances()
    content["annotations"][0]["segmentation"] = segmentation
    index = dataset.index(content)
    (kind,) = index.problems
    assert kind.startswith("annotations: ")
    assert index.problems[kind].count == 1
    assert "id 1" in index.problems[kind].examples[0]
    assert len(index.problems[kind].examples[0]) < 300
    assert len(index.object_masks(1)) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": None}, '"id"'),
        ({"id": "1"}, '"id"'),
        ({"id": 1.0}, '"id"'),
        ({"id": True}, '"id"'),
        ({"id": 2}, "used twice"),
        ({"image_id": None}, '"image_id"'),
        ({"image_id": "9"}, '"image_id"'),
        ({"image_id": [9]}, '"image_id"'),
        ({"image_id": 77}, '"image_id"'),
        ({"image_id": -1}, '"image_id"'),
        ({"category_id": 99}, '"category_id"'),
        ({"category_id": "18"}, '"category_id"'),
        ({"iscrowd": None}, '"iscrowd"'),
        ({"iscrowd": 2}, '"iscrowd"'),
        ({"iscrowd": "0"}, '"iscrowd"'),
    ],
)
def test_a_bad_annotation_is_left_out_and_counted(
    dataset: Dataset, change: Json, reason: str
) -> None:
    content = instances()
    content["annotations"][0].update(change)
    index = dataset.index(content)
    assert len(index.object_masks(1)) == 1, index.problems
    ((kind, count),) = counts_of(index).items()
    assert reason in kind
    assert count == 1


@pytest.mark.parametrize("key", ["id", "image_id", "category_id", "segmentation"])
def test_an_annotation_that_lacks_a_key_is_left_out(dataset: Dataset, key: str) -> None:
    content = instances()
    del content["annotations"][0][key]
    assert sum(counts_of(dataset.index(content)).values()) == 1


@pytest.mark.parametrize("row", [None, [], "text", 5, [["id", 1]]])
def test_rows_that_are_no_objects_are_left_out(dataset: Dataset, row: object) -> None:
    content = instances()
    for table in content.values():
        table.append(row)
    index = dataset.index(content)
    assert counts_of(index) == {
        f"{table}: a row must be a json object": 1
        for table in ("images", "annotations", "categories")
    }
    assert len(index) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"id": "9"},
        {"id": 9.0},
        {"id": -9},
        {"id": 2**63},
        {"id": 4},
        {"width": None},
        {"width": 0},
        {"width": -8},
        {"width": 8.0},
        {"width": "8"},
        {"height": 70_000},
        {"height": 30_000, "width": 30_000},
        {"file_name": None},
        {"file_name": ""},
        {"file_name": "."},
        {"file_name": 7},
        {"file_name": "missing.jpg"},
        {"file_name": "b\0.jpg"},
        {"file_name": "\ud800.jpg"},
        {"file_name": "x" * 5000},
        {"file_name": "sub"},
    ],
)
def test_a_bad_picture_is_left_out_with_its_records(dataset: Dataset, change: Json) -> None:
    content = instances()
    content["images"].reverse()
    content["images"][1].update(change)
    index = dataset.index(content)
    assert index.image_ids.tolist() == [4]
    counts = counts_of(index)
    assert sum(kind.startswith("images: ") for kind in counts) == 1, counts
    if "id" not in change:  # else its records cannot be known to be its own
        assert sum(counts.values()) == 1, counts
    assert index.captions(0) == ["空の部屋 \U0001f600"]


@pytest.mark.parametrize("up", ["../images/b.jpg", "sub/../b.jpg", "C:b.jpg", "c:/b.jpg", "sub\\b"])
def test_file_names_that_lead_elsewhere_are_refused_as_text(dataset: Dataset, up: str) -> None:
    (dataset.image_dir / "sub\\b").touch()
    content = instances()
    content["images"][0]["file_name"] = up
    index = dataset.index(content)
    assert index.image_ids.tolist() == [4]
    assert 'images: "file_name" must be a relative path below --image_dir' in index.problems


def test_an_absolute_file_name_is_refused(dataset: Dataset) -> None:
    content = instances()
    content["images"][0]["file_name"] = str(dataset.image_dir / "b.jpg")
    assert dataset.index(content).image_ids.tolist() == [4]


def test_of_two_pictures_with_one_id_the_first_counts(dataset: Dataset) -> None:
    content = instances()
    content["images"].append({**content["images"][0], "file_name": "sub/a.jpg"})
    index = dataset.index(content)
    assert index.image_path(1).name == "b.jpg"
    assert counts_of(index) == {'images: "id" must not be used twice': 1}


def test_records_of_a_missing_picture_are_not_counted_again(dataset: Dataset) -> None:
    (dataset.image_dir / "b.jpg").unlink()
    index = dataset.index()
    assert counts_of(index) == {'images: "file_name" must be a file below --image_dir': 1}
    assert index.image_ids.tolist() == [4]


@pytest.mark.parametrize(
    "caption", ["", "  \n", None, 5, ["A dog."], {"text": "A dog."}, "\ud800", float("nan")]
)
def test_captions_that_say_nothing_are_left_out(dataset: Dataset, caption: object) -> None:
    content = captions()
    content["annotations"][0]["caption"] = caption
    dataset.caption_file.write_text(json.dumps(content))
    index = dataset.index()
    assert index.captions(1) == ["A cat."]
    assert counts_of(index) == {'captions: "caption" must be a text that is not blank': 1}


def test_a_caption_of_an_unknown_picture_is_left_out(dataset: Dataset) -> None:
    content = captions()
    content["annotations"][0]["image_id"] = 77
    dataset.caption_file.write_text(json.dumps(content))
    index = dataset.index()
    assert index.captions(1) == ["A cat."]
    assert sum(counts_of(index).values()) == 1


def test_only_the_first_examples_of_a_kind_are_kept(dataset: Dataset) -> None:
    content = instances()
    content["annotations"] += [{"id": None}] * 1000
    (problem,) = dataset.index(content).problems.values()
    assert problem.count == 1000
    assert len(problem.examples) == 5


# Files that are something else


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which is empty"),
        (b" \n ", "which is empty"),
        (b"<!DOCTYPE html><html>404</html>", "which is an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "gzip archive"),
        (b"PK\x03\x04\x00", "zip archive"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "which is not text"),
        (b'[{"image_id": 1, "score": 0.5}]', "a bare list, as of detection results"),
        (b'"text"', "something else than a json object"),
        (b"{}", 'a json without "images"'),
        (b'{"images": {}, "annotations": []}', '"images" is not a list'),
        (b'{"images": [], "annotations": [], "categories": []}', "no usable picture"),
        (b'{"images": [}', "breaks off at character 12"),
        (b'{"images": [1 2]}', "breaks off at character 14"),
        (b'{"images" []}', "breaks off"),
        (b'{"info": ' + b"[" * 100_000, "breaks off"),
        (b'{"info": ' + b"9" * 10_000 + b"}", "breaks off"),
    ],
)
def test_a_file_that_is_no_instances_json_is_named(
    dataset: Dataset, content: bytes, message: str
) -> None:
    dataset.ann_file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        dataset.index()
    assert str(raised.value).startswith("--ann_file must be a")
    assert str(dataset.ann_file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_was_cut_off_anywhere_is_refused(dataset: Dataset) -> None:
    whole = dataset.ann_file.read_bytes()
    for length in range(1, len(whole), 7):
        dataset.ann_file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="--ann_file must be"):
            dataset.index()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_every_unicode_encoding_of_json_is_read(dataset: Dataset, encoding: str) -> None:
    text = json.dumps(captions(), ensure_ascii=False)
    dataset.caption_file.write_bytes(text.encode(encoding))
    assert dataset.index().captions(0) == ["空の部屋 \U0001f600"]


def test_captions_and_instances_are_told_apart(dataset: Dataset) -> None:
    swapped = {"image_dir": dataset.image_dir, "cache_dir": dataset.cache_dir}
    with pytest.raises(ValueError, match="--ann_file must be a COCO instances json, got a capt"):
        CocoIndex.from_annotations(**swapped, ann_file=dataset.caption_file)
    with pytest.raises(ValueError, match="--caption_file must be a COCO captions json, got an ins"):
        CocoIndex.from_annotations(
            **swapped, ann_file=dataset.ann_file, caption_file=dataset.ann_file
        )


def test_captions_of_another_split_are_refused(dataset: Dataset) -> None:
    content = captions()
    for record in content["annotations"]:
        record["image_id"] += 1000
    dataset.caption_file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="got no caption of any picture of this data set"):
        dataset.index()


def test_a_missing_file_names_its_flag(dataset: Dataset) -> None:
    dataset.caption_file.unlink()
    with pytest.raises(FileNotFoundError, match="--caption_file must name a file"):
        dataset.index()
    dataset.ann_file.unlink()
    with pytest.raises(FileNotFoundError, match="--ann_file must name a file"):
        dataset.index()


def test_when_every_picture_is_missing_the_folder_is_asked_for(dataset: Dataset) -> None:
    dataset.image_dir = dataset.image_dir / "sub"
    with pytest.raises(FileNotFoundError, match="--image_dir must hold the pictures that --ann"):
        dataset.index()


# Cache and workers


def test_the_second_index_comes_from_the_cache(
    dataset: Dataset, forbid_building: Callable[[], None]
) -> None:
    dataset.index()
    forbid_building()
    assert dataset.index().captions(1) == ["A dog.", "A cat."]
    with pytest.raises(AssertionError, match="built again"):
        dataset.folder_index()


def test_a_changed_json_is_read_again(dataset: Dataset) -> None:
    dataset.index()
    content = instances()
    content["categories"][0]["name"] = "cow"  # as many bytes as before
    assert dataset.index(content).category_names(1) == ["cow", "dog"]


def test_pictures_that_come_or_go_are_noticed(dataset: Dataset) -> None:
    path = dataset.image_dir / "sub" / "a.jpg"
    path.unlink()
    assert dataset.index().image_ids.tolist() == [9]
    path.touch()
    assert dataset.index().image_ids.tolist() == [4, 9]
    path.unlink()
    assert dataset.index().image_ids.tolist() == [9]


def test_a_folder_time_without_a_change_leaves_one_cache_that_is_fresh(
    dataset: Dataset, forbid_building: Callable[[], None]
) -> None:
    dataset.index()
    os.utime(dataset.image_dir, (1, 1))
    dataset.index()
    assert len(list(dataset.cache_dir.iterdir())) == 1
    forbid_building()
    dataset.index()


def test_a_torn_cache_is_built_again(dataset: Dataset) -> None:
    expected = [dict(rle) for rle in dataset.index().object_masks(1)]
    (folder,) = dataset.cache_dir.iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 14
    for name in names:
        whole = (folder / name).read_bytes()
        for damaged in (None, b"", whole[:20], whole[:-1]):
            if damaged is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(damaged)
            index = dataset.index()
            assert [dict(rle) for rle in index.object_masks(1)] == expected, name
            assert (folder / name).read_bytes() == whole
            assert [path.name for path in dataset.cache_dir.iterdir()] == [folder.name]
            assert sorted(path.name for path in folder.iterdir()) == names


def test_a_build_that_was_killed_leaves_nothing_for_ever(dataset: Dataset) -> None:
    old, young = (dataset.cache_dir / f".building-{age}" for age in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "rle_bytes.npy").touch()
    os.utime(old, (1, 1))
    dataset.index()
    assert not old.exists()
    assert young.exists()


def test_a_failed_write_leaves_no_cache(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(coco, "_flush", fail)
    with pytest.raises(OSError, match="No space left"):
        dataset.index()
    assert list(dataset.cache_dir.iterdir()) == []


def _build_in_process(dataset: Dataset, barrier: Any, answers: Any) -> None:
    barrier.wait()
    answers.put(dataset.index().category_names(1))


def test_processes_that_build_at_once_get_the_same(dataset: Dataset) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=_build_in_process, args=(dataset, barrier, answers))
        for _ in range(4)
    ]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [["cat", "dog"]] * 4
    for process in processes:
        process.join()
    assert len(list(dataset.cache_dir.iterdir())) == 1


def test_a_worker_is_sent_two_paths(dataset: Dataset) -> None:
    content = instances()
    content["annotations"] += [{**content["annotations"][0], "id": 100 + i} for i in range(5000)]
    index = dataset.index(content)
    sent = pickle.dumps(index)
    assert len(sent) < 2000
    copied = pickle.loads(sent)
    assert copied.object_masks(1) == index.object_masks(1)
    assert copied.captions(1) == index.captions(1)
    assert copied.problems == index.problems


def test_no_python_object_is_kept_per_record(dataset: Dataset) -> None:
    def num_objects(thing: object) -> int:
        if isinstance(thing, dict):
            return 1 + sum(map(num_objects, thing.values()))
        if isinstance(thing, list | tuple):
            return 1 + sum(map(num_objects, thing))
        return 1

    few = num_objects(vars(dataset.index()))
    content = instances()
    content["annotations"] += [{**content["annotations"][0], "id": 100 + i} for i in range(500)]
    index = dataset.index(content)
    assert num_objects(vars(index)) == few
    for name, values in index._arrays.items():
        assert isinstance(values.base, np.memmap), name
        assert not values.flags.writeable, name


# Without annotations


def test_a_folder_gives_every_picture_file(dataset: Dataset) -> None:
    for name in (
        "000000000007.JPG",
        "sub/COCO_val2014_000000000003.jpeg",
        "x.WebP",
        "y.PNG",
        "z.bmp",
    ):
        (dataset.image_dir / name).touch()
    for name in ("notes.txt", "._b.jpg", ".hidden.png", "jpg"):
        (dataset.image_dir / name).touch()
    index = dataset.folder_index()
    names = {index.image_path(row).relative_to(dataset.image_dir).as_posix() for row in range(7)}
    assert len(index) == 7
    assert names == {
        "b.jpg", "sub/a.jpg", "000000000007.JPG", "sub/COCO_val2014_000000000003.jpeg",
        "x.WebP", "y.PNG", "z.bmp",
    }  # fmt: skip
    assert index.image_ids[:2].tolist() == [3, 7]
    assert (np.diff(index.image_ids) > 0).all()
    assert index.object_masks(0) == []
    assert index.category_names(0) == []
    assert index.captions(0) == []
    assert index.size(0) == (0, 0)


def test_a_path_keeps_its_id_for_ever(dataset: Dataset) -> None:
    ids = dataset.folder_index().image_ids.tolist()
    assert ids == [5412235010107764591, 9205087103849422345]


def test_pictures_with_the_same_number_get_ids_of_their_own(dataset: Dataset) -> None:
    for name in ("000000000007.jpg", "000000000007.png", "sub/000000000007.jpg"):
        (dataset.image_dir / name).touch()
    index = dataset.folder_index()
    assert len(set(index.image_ids.tolist())) == 5
    assert 7 not in index.image_ids


def test_captions_of_a_folder_are_matched_by_file_name(dataset: Dataset) -> None:
    index = dataset.folder_index(caption_file=dataset.caption_file)
    said = {index.image_path(row).name: index.captions(row) for row in range(2)}
    assert said == {"b.jpg": ["A dog.", "A cat."], "a.jpg": ["空の部屋 \U0001f600"]}


def test_captions_of_a_folder_are_matched_by_number(dataset: Dataset) -> None:
    (dataset.image_dir / "000000000009.jpg").touch()
    content = captions()
    del content["images"]
    dataset.caption_file.write_text(json.dumps(content))
    index = dataset.folder_index(caption_file=dataset.caption_file)
    assert index.captions(0) == ["A dog.", "A cat."]
    assert sum(counts_of(index).values()) == 1  # the one of picture 4


def test_links_are_followed_and_may_lead_back(dataset: Dataset, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c.jpg").touch()
    (dataset.image_dir / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(dataset.image_dir)
    index = dataset.folder_index()
    assert sorted(index.image_path(row).name for row in range(len(index))) == [
        "a.jpg", "b.jpg", "c.jpg",
    ]  # fmt: skip


def test_an_empty_folder_names_the_flag(dataset: Dataset) -> None:
    dataset.image_dir = dataset.cache_dir
    with pytest.raises(FileNotFoundError, match="--image_dir must hold pictures"):
        dataset.folder_index()


@pytest.mark.skipif(os.name != "posix", reason="names as bytes are POSIX")
def test_file_names_that_are_no_unicode_are_found_again(dataset: Dataset) -> None:
    name = os.fsdecode(b"\xff\xfe 000.jpg")
    (dataset.image_dir / name).touch()
    index = dataset.folder_index()
    assert all(index.image_path(row).exists() for row in range(3))
