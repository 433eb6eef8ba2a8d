"""COCO's rows: masks equal pycocotools', and no row is trusted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from inpainting.coco import CocoIndex
from inpainting.coco_records import BadRecordError, compress, parse_category
from tests.coco_dataset import HEIGHT, SQUARE, WIDTH, Dataset, Json, captions, counts_of, instances

REAL_DATA = Path(__file__).parents[2].parent / "shared" / "data"
NAN, INF = float("nan"), float("inf")


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


@pytest.mark.parametrize(
    "polygon",
    [
        [1, 2, 6, 2, 4, 2],  # no height, as COCO's record 918
        [3, 1, 3, 5, 3, 2],  # no width
        [2.1, 2.1, 2.3, 2.1, 2.2, 2.3],  # smaller than a pixel
        [2.3, 2.3, 2.9, 2.3, 2.6, 2.9],  # likewise, and yet it covers one
        [3, 3, 3, 3, 3, 3],
        [-7, -5, -1, -5, -4, -1],  # outside of the picture
        [9, 1, 12, 1, 12, 4],
        [-8, -6, 16, -6, 16, 12, -8, 12],  # around all of it
        [1, 1, 5, 4, 5, 1, 1, 4],  # crossing itself
    ],
)
def test_degenerate_polygons_are_pycocotools_own_masks(polygon: list[float]) -> None:
    reference: Any = COCO()
    reference.imgs = {0: {"height": HEIGHT, "width": WIDTH}}
    expected = reference.annToMask({"image_id": 0, "segmentation": [polygon]})
    counts = compress([polygon], height=HEIGHT, width=WIDTH)
    np.testing.assert_array_equal(
        coco_mask.decode({"size": [HEIGHT, WIDTH], "counts": counts}), expected
    )


# Bad rows


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
        ([[-1e9, 1, 5, 1, 5, 4]], "within one picture size"),
        ([[1, 1, 5, 1e9, 5, 4]], "within one picture size"),
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


def test_of_a_huge_bad_value_little_is_told() -> None:
    """Found by fuzzing: nested values came out at any length."""
    nested: object = "long \U0001f600 words " * 100
    for _ in range(5):
        nested = {f"{key}" * 30: [nested] * 6 for key in range(4)}
    with pytest.raises(BadRecordError) as caught:
        compress({"size": nested}, height=HEIGHT, width=WIDTH)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["", " \n", None, 5, ["dog"], "\ud800"])
def test_a_category_without_a_name_is_refused(name: object) -> None:
    assert parse_category({"id": 3, "name": " dog "}) == (3, "dog")
    with pytest.raises(BadRecordError, match='"name" must be a text that is not blank'):
        parse_category({"id": 3, "name": name})


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
    index = dataset.index(content)
    assert index.image_ids.tolist() == [4]
    assert 'images: "file_name" must be a relative path below --image_dir' in index.problems


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
