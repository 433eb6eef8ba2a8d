"""The index: what it says by row, its cache, what workers are sent."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from inpainting import coco
from inpainting.coco import CocoIndex
from tests.coco_dataset import HEIGHT, WIDTH, Dataset, instances


@pytest.fixture
def forbid_building(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def build(*args: object, **options: object) -> None:
        raise AssertionError("the index was built again")

    return lambda: monkeypatch.setattr(coco, "build_contents", build)


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
    assert len(names) == 12
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
        (folder / "masks_bytes.npy").touch()
    os.utime(old, (1, 1))
    dataset.index()
    assert not old.exists()
    assert young.exists()


def test_a_failed_write_leaves_no_cache(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(coco, "sync", fail)
    with pytest.raises(OSError, match="No space left"):
        dataset.index()
    assert list(dataset.cache_dir.iterdir()) == []


def _build_in_process(dataset: Dataset, barrier: Any, answers: Any) -> None:
    barrier.wait()
    answers.put(dataset.index().category_names(1))


def test_of_processes_that_come_at_once_one_builds(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    barrier, answers, builds = context.Barrier(4), context.Queue(), context.Queue()
    build = coco.build_contents

    def build_slowly(*args: Any, **options: Any) -> Any:
        builds.put("built")
        time.sleep(0.3)
        return build(*args, **options)

    monkeypatch.setattr(coco, "build_contents", build_slowly)
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
    assert builds.get(timeout=60) == "built"
    assert builds.empty(), "a second process built too"


def test_indexes_that_nobody_used_for_long_are_removed(dataset: Dataset) -> None:
    hours, kept = 3600.0, []
    for age_h in (50, 40, 30, 60):
        content = instances()
        content["categories"][0]["name"] = f"cat of {age_h} hours ago"
        dataset.index(content)
        (folder,) = set(dataset.cache_dir.iterdir()) - set(kept)
        kept.append(folder)
    for folder, age_h in zip(kept, (50, 40, 30, 60), strict=True):
        os.utime(folder, (time.time() - age_h * hours,) * 2)
    dataset.index()  # the last one is used again, the first one is the oldest now
    content["categories"][0]["name"] = "one too many"
    dataset.index(content)
    left = set(dataset.cache_dir.iterdir())
    assert len(left) == 4
    assert kept[0] not in left
    assert {*kept[1:]} < left
    for name in ("cow", "goat"):
        os.utime(kept[1], (time.time() - 20 * hours,) * 2)
        content["categories"][0]["name"] = name
        dataset.index(content)
    assert kept[1].exists(), "a run of today may still need it"


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
