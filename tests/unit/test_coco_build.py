"""Building the index: which rows and files make one, with and without annotations."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from inpainting.coco import CocoIndex
from tests.coco_dataset import Dataset, captions, counts_of, instances


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


def test_two_ids_of_one_category_name_are_one_name(dataset: Dataset) -> None:
    content = instances()
    content["categories"][0]["name"] = "dog "
    assert dataset.index(content).category_names(1) == ["dog"]


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


def test_a_linked_picture_and_a_linked_folder_are_followed(
    dataset: Dataset, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("b.jpg", "sub/a.jpg"):
        (dataset.image_dir / name).rename(elsewhere / Path(name).name)
    (dataset.image_dir / "sub").rmdir()
    (dataset.image_dir / "sub").symlink_to(elsewhere)
    (dataset.image_dir / "b.jpg").symlink_to(elsewhere / "b.jpg")
    assert len(dataset.index()) == 2


def test_a_link_that_leads_nowhere_is_a_missing_picture(dataset: Dataset) -> None:
    (dataset.image_dir / "b.jpg").unlink()
    (dataset.image_dir / "b.jpg").symlink_to("nowhere.jpg")
    assert dataset.index().image_ids.tolist() == [4]


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


@pytest.mark.parametrize("name", [["b.jpg"], {"b.jpg": 1}, None, 5])
def test_a_picture_without_a_name_among_captions_matches_no_file(
    dataset: Dataset, name: object
) -> None:
    """Found by fuzzing: a list was looked up as if it were a name."""
    content = captions()
    content["images"].append({"id": 77, "file_name": name})
    dataset.caption_file.write_text(json.dumps(content))
    index = dataset.folder_index(caption_file=dataset.caption_file)
    said = {index.image_path(row).name: index.captions(row) for row in range(2)}
    assert said["b.jpg"] == ["A dog.", "A cat."]


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
