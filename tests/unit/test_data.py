"""One COCO record -> one Sample: its contract, and what its bits depend on."""

from __future__ import annotations

import errno
import json
import logging
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import CocoInpaintingDataset, MissingViews, Sample
from inpainting import unreadable
from inpainting.coco import CocoIndex
from inpainting.latents import NO_SLOT, MomentsCache, Slot
from inpainting.masks import dilate
from inpainting.randomness import generator
from inpainting.unreadable import UnreadablePictureError, UnreadablePictures
from tests import tiny

RED = (255, 0, 0)


@pytest.fixture(scope="module")
def index() -> CocoIndex:
    return tiny.coco_index()


@pytest.fixture(scope="module")
def train_set(index) -> CocoInpaintingDataset:
    return tiny.dataset(index, tiny.rule(), is_training=True)


@pytest.fixture(scope="module")
def val_set(index) -> CocoInpaintingDataset:
    return tiny.dataset(index, tiny.rule(), is_training=False)


def differences(one: Sample, other: Sample) -> set[str]:
    assert one.keys() == other.keys()
    return {
        name
        for name, value in one.items()
        if not (torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name])
    }


def write_coco(folder: Path, pictures: list[np.ndarray], boxes: list[list[int]]) -> CocoIndex:
    """Write pictures with ids 1, 2, ... that each show one rectangular object."""
    (folder / "images").mkdir()
    images, annotations = [], []
    for i, (picture, (x, y, w, h)) in enumerate(zip(pictures, boxes, strict=True), start=1):
        Image.fromarray(picture).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": picture.shape[0],
                       "width": picture.shape[1]})  # fmt: skip
        annotations.append({
            "id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "area": w * h,
            "bbox": [x, y, w, h],
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        })  # fmt: skip
    records = {"images": images, "annotations": annotations,
               "categories": [{"id": 1, "name": "box"}]}  # fmt: skip
    (folder / "instances.json").write_text(json.dumps(records))
    return CocoIndex.from_annotations(
        folder / "images", ann_file=folder / "instances.json", cache_dir=folder / "cache"
    )


# ---- the contract


@pytest.mark.parametrize("is_training", [True, False])
def test_every_sample_fulfils_the_contract(index, is_training: bool) -> None:
    dataset = tiny.dataset(index, tiny.rule(), is_training=is_training)
    shapes = {
        "image": ((3, 64, 64), torch.uint8),
        "mask": ((1, 64, 64), torch.uint8),
        "input_ids": ((77,), torch.int64),
        "timestep": ((), torch.int64),
        "noise": ((4, 8, 8), torch.float32),
        "posterior_noise": ((4, 8, 8), torch.float32),
        "image_id": ((), torch.int64),
    }
    assert len(dataset) == len(index) == tiny.NUM_SCENES
    for position in range(len(dataset)):
        sample = dataset[3, position]
        assert isinstance(sample["prompt"], str)
        got = {n: (tuple(t.shape), t.dtype) for n, t in sample.items() if torch.is_tensor(t)}
        assert got == shapes
        assert set(sample["mask"].unique().tolist()) == {0, 1}
        assert 0.1 <= sample["mask"].float().mean() <= 0.3
        assert sample["image_id"] == index.image_ids[position]
        assert sample["image"].is_contiguous()
        assert 0 <= sample["timestep"] < 1000
        assert sample["image"].float().std() > 1, "an empty picture"


def test_samples_stack_to_batches(train_set) -> None:
    batch = torch.utils.data.default_collate([train_set[0, i] for i in range(3)])
    assert batch["image"].shape == (3, 3, 64, 64)
    assert batch["timestep"].shape == (3,)
    assert len(batch["prompt"]) == 3


def test_noise_is_standard_normal_and_timesteps_are_uniform(index) -> None:
    rule = replace(tiny.rule(), num_train_timesteps=4)
    dataset = tiny.dataset(index, rule, is_training=True)
    samples = [dataset[epoch, i] for epoch in range(20) for i in range(len(dataset))]
    for name in ("noise", "posterior_noise"):
        values = torch.stack([sample[name] for sample in samples])
        # 61,440 numbers: mean and deviation are known to about 0.4 %
        assert abs(values.mean()) < 0.02
        assert abs(values.std() - 1) < 0.02
    counts = np.bincount([int(sample["timestep"]) for sample in samples], minlength=4)
    assert counts.min() > 35, f"240 timesteps fall as {counts}"
    both = torch.stack([torch.stack([s["noise"], s["posterior_noise"]]) for s in samples])
    correlation = (both[:, 0] * both[:, 1]).mean()
    assert abs(correlation) < 0.02, f"noise and posterior_noise correlate: {correlation:.3f}"


# ---- what the bits depend on


def test_a_sample_depends_on_seed_epoch_and_picture_alone(index) -> None:
    straight = tiny.dataset(index, tiny.rule(), is_training=True)
    expected = {int(s["image_id"]): s for s in (straight[2, i] for i in range(len(index)))}
    rows = list(range(len(index)))
    random.Random(0).shuffle(rows)
    rows = rows[: len(rows) // 2]
    other = tiny.dataset(index, tiny.rule(), rows=rows, is_training=True)
    np.random.seed(1)  # noqa: NPY002 - global state must play no part
    torch.manual_seed(1)
    for position in reversed(range(len(rows))):
        for epoch in (7, 2):  # another epoch in between leaves no trace
            sample = other[epoch, position]
        assert not differences(sample, expected[int(sample["image_id"])])


def test_a_sample_stays_as_it_was_when_other_pictures_come_or_go(tmp_path) -> None:
    pictures = [np.full((64, 64, 3), 40 * i, np.uint8) for i in range(1, 5)]
    many = write_coco(tmp_path, pictures, [[8, 8, 30, 30]] * 4)
    expected = tiny.dataset(many, tiny.rule(), is_training=True)[1, 2]
    (tmp_path / "images" / "1.png").unlink()
    few = CocoIndex.from_annotations(
        tmp_path / "images", ann_file=tmp_path / "instances.json", cache_dir=tmp_path / "other"
    )
    sample = tiny.dataset(few, tiny.rule(), is_training=True)[1, 1]
    assert sample["image_id"] == 3
    assert not differences(sample, expected)


def test_another_epoch_and_another_seed_draw_everything_anew(index, train_set) -> None:
    reseeded = tiny.dataset(index, tiny.rule(seed=43), is_training=True)
    for position in range(len(index)):
        sample = train_set[0, position]
        fresh = {"mask", "noise", "posterior_noise"}
        assert fresh <= differences(sample, train_set[1, position])
        assert fresh <= differences(sample, reseeded[0, position])


def test_pictures_of_one_epoch_get_different_noise_and_holes(train_set) -> None:
    samples = [train_set[0, i] for i in range(len(train_set))]
    for name in ("noise", "posterior_noise", "mask"):
        distinct = {sample[name].numpy().tobytes() for sample in samples}
        assert len(distinct) == len(samples), name


def test_each_purpose_has_its_own_stream() -> None:
    streams = [
        generator(seed, purpose, epoch, image_id).integers(2**62)
        for seed in (0, 1)
        for purpose in ("crop", "mask")
        for epoch in (0, 1)
        for image_id in (0, 1, 2**40)
    ]
    assert len(set(streams)) == len(streams)
    assert generator(0, "crop", 1, 2).integers(2**62) == generator(0, "crop", 1, 2).integers(2**62)


def test_validation_is_the_same_at_every_epoch_of_every_run(index, val_set) -> None:
    other_run = tiny.dataset(index, tiny.rule(seed=1), is_training=False)
    for position in range(len(index)):
        sample = val_set[0, position]
        assert not differences(sample, val_set[5, position])
        assert not differences(sample, other_run[0, position])


def test_validation_keeps_its_prompts_and_training_drops_half(index, train_set, val_set) -> None:
    assert all(val_set[0, i]["prompt"] for i in range(len(index)))
    dropped = [not train_set[epoch, i]["prompt"] for epoch in range(20) for i in range(len(index))]
    assert 85 < sum(dropped) < 155, f"{sum(dropped)} of {len(dropped)} prompts dropped"
    never = tiny.dataset(index, replace(tiny.rule(), empty_prompt_prob=0.0), is_training=True)
    assert all(never[0, i]["prompt"] for i in range(len(index)))


def test_validation_is_cut_from_the_centre_and_not_flipped(tmp_path) -> None:
    columns = np.arange(128, dtype=np.uint8)
    picture = np.broadcast_to(columns[None, :, None], (64, 128, 3)).copy()
    index = write_coco(tmp_path, [picture], [[50, 10, 20, 40]])
    image = tiny.dataset(index, tiny.rule(), is_training=False)[0, 0]["image"]
    assert torch.equal(image[0, 0], torch.arange(32, 96, dtype=torch.uint8))


# ---- geometry


def test_flip_and_crop_move_image_and_mask_together(tmp_path) -> None:
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[..., 1] = np.arange(96)
    x, y, w, h = 36, 4, 10, 50  # inside every square that can be cut, off its middle
    picture[y : y + h, x : x + w] = RED
    index = write_coco(tmp_path, [picture], [[x, y, w, h]])
    rule = tiny.rule(num_crops=24)
    rule = replace(rule, mask_types={"object": 1.0}, mask_area_range=(0.05, 0.5))
    dataset = tiny.dataset(index, rule, is_training=True)
    lefts, flips = set(), []
    for epoch in range(24):
        sample = dataset[epoch, 0]
        image, mask = sample["image"].numpy(), sample["mask"][0].numpy()
        is_red = (image[0] > 250) & (image[1] < 5)
        assert is_red.sum() == w * h
        assert mask[is_red].all(), f"epoch {epoch}: part of the object lies outside its hole"
        # The object is grown by 0.25 to 1.25 pixels at this size.
        rim = mask.astype(bool) & ~dilate(is_red.astype(np.uint8), radius=2).astype(bool)
        assert not rim.any(), f"epoch {epoch}: {rim.sum()} pixels of the hole lie elsewhere"
        ramp = image[1, 63].astype(int)
        flips.append(bool(ramp[0] > ramp[-1]))
        lefts.add(int(min(ramp[0], ramp[-1])))
    assert 4 <= sum(flips) <= 20, flips
    assert len(lefts) > 10, lefts


@pytest.mark.parametrize("num_crops", [1, 3])
def test_a_picture_has_few_views_and_runs_with_other_seeds_the_same(tmp_path, num_crops) -> None:
    columns = np.arange(128, dtype=np.uint8)
    picture = np.broadcast_to(columns[None, :, None], (64, 128, 3)).copy()
    index = write_coco(tmp_path, [picture, picture], [[50, 10, 20, 40]] * 2)
    views = {}
    for seed in (1, 2):
        dataset = tiny.dataset(
            index, tiny.rule(seed=seed, num_crops=num_crops), is_training=True
        )  # fmt: skip
        for position in (0, 1):
            views[seed, position] = {
                dataset[epoch, position]["image"].numpy().tobytes() for epoch in range(60)
            }
    assert {len(found) for found in views.values()} == {2 * num_crops}
    assert views[1, 0] == views[2, 0]
    assert views[1, 0] != views[1, 1], "each picture has its own crops"
    mirrored = {np.frombuffer(v, np.uint8).reshape(3, 64, 64)[..., ::-1].tobytes()
                for v in views[1, 0]}  # fmt: skip
    assert mirrored == views[1, 0]


def test_the_picture_keeps_its_aspect(tmp_path) -> None:
    yy, xx = np.mgrid[:200, :300]
    disc = (xx - 150) ** 2 + (yy - 100) ** 2 < 60**2
    picture = np.where(disc[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    index = write_coco(tmp_path, [picture], [[100, 60, 90, 90]])
    image = tiny.dataset(index, tiny.rule(), is_training=False)[0, 0]["image"][0] > 127
    height, width = image.any(dim=1).sum(), image.any(dim=0).sum()
    assert abs(int(height) - int(width)) <= 1
    assert abs(int(height) - 120 * 64 / 200) <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_a_picture_of_one_pixels_width_fulfils_the_contract(tmp_path, size) -> None:
    height, width = size
    index = write_coco(tmp_path, [np.full((*size, 3), 9, np.uint8)], [[0, 0, width, height]])
    sample = tiny.dataset(index, tiny.rule(), is_training=True)[0, 0]
    assert sample["image"].unique().tolist() == [9]
    assert 0.1 <= sample["mask"].float().mean() <= 0.3


def test_a_record_with_width_and_height_swapped_is_left_out(tmp_path, caplog) -> None:
    pictures = [np.zeros((64, 80, 3), np.uint8), np.zeros((64, 80, 3), np.uint8)]
    write_coco(tmp_path, pictures, [[8, 8, 30, 30]] * 2)
    content = json.loads((tmp_path / "instances.json").read_text())
    content["images"][0] |= {"height": 80, "width": 64}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    index = CocoIndex.from_annotations(
        tmp_path / "images", ann_file=tmp_path / "instances.json", cache_dir=tmp_path / "cache"
    )
    assert tiny.dataset(index, tiny.rule(), is_training=True)[0, 0]["image_id"] == 2
    assert "got 80 x 64 px for 64 x 80" in caplog.text


# ---- pictures that can't be read


@pytest.fixture
def broken_index(tmp_path) -> CocoIndex:
    pictures = [np.full((64, 64, 3), 40 * i, np.uint8) for i in range(1, 5)]
    index = write_coco(tmp_path, pictures, [[8, 8, 30, 30]] * 4)
    path = tmp_path / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    return index


def test_an_unreadable_picture_is_replaced_by_the_next_and_named_once(broken_index, caplog) -> None:
    dataset = tiny.dataset(broken_index, tiny.rule(), is_training=True)
    with caplog.at_level(logging.WARNING):
        ids = [int(dataset[epoch, i]["image_id"]) for epoch in range(3) for i in range(4)]
    assert ids == [1, 3, 3, 4] * 3
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1, lines
    assert "2.png" in lines[0]


def test_the_replacement_has_its_own_samples_bits(broken_index) -> None:
    dataset = tiny.dataset(broken_index, tiny.rule(), is_training=True)
    assert not differences(dataset[5, 1], dataset[5, 2])


def test_the_last_picture_is_replaced_by_the_first(tmp_path, broken_index) -> None:
    (tmp_path / "images" / "4.png").unlink()
    dataset = tiny.dataset(broken_index, tiny.rule(), is_training=True)
    assert dataset[0, 3]["image_id"] == 1


def test_a_picture_of_another_size_than_its_record_is_left_out(tmp_path, broken_index, caplog):
    Image.new("RGB", (65, 64)).save(tmp_path / "images" / "1.png")
    dataset = tiny.dataset(broken_index, tiny.rule(), is_training=True)
    assert dataset[0, 0]["image_id"] == 3
    assert "must have the size in its record, got 65 x 64 px for 64 x 64" in caplog.text


def test_a_split_without_one_readable_picture_is_refused(tmp_path, broken_index) -> None:
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    dataset = tiny.dataset(broken_index, tiny.rule(), is_training=True)
    with pytest.raises(ValueError, match="at least one picture must be readable, got none"):
        dataset[0, 0]


def test_strict_data_ends_at_the_first_unreadable_picture(broken_index) -> None:
    dataset = tiny.dataset(broken_index, tiny.rule(), is_training=True, is_strict=True)
    assert dataset[0, 0]["image_id"] == 1
    with pytest.raises(UnreadablePictureError, match=r"--strict_data: .*2\.png must be a whole"):
        dataset[0, 1]


def test_no_order_of_reading_changes_what_takes_a_bad_pictures_place(broken_index) -> None:
    addresses = [(epoch, position) for epoch in range(3) for position in range(4)]
    straight = tiny.dataset(broken_index, tiny.rule(), is_training=True)
    expected = {address: straight[address] for address in addresses}
    for seed in range(4):
        random.Random(seed).shuffle(addresses)
        other = tiny.dataset(broken_index, tiny.rule(), is_training=True)
        for address in addresses:
            assert not differences(other[address], expected[address]), (seed, address)


class FailingDisk:
    """Lets pictures fail to open for a while, as a disk or a network does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, number: int, times: int) -> None:
        self.pauses: list[float] = []
        self._left = times
        self._open = CocoIndex.open_picture
        self._number = number
        monkeypatch.setattr(CocoIndex, "open_picture", lambda index, row: self.open(index, row))
        monkeypatch.setattr(unreadable.time, "sleep", self.pauses.append)

    def open(self, index: CocoIndex, row: int) -> Image.Image:
        if self._left:
            self._left -= 1
            raise OSError(self._number, "the disk says no", str(index.image_path(row)))
        return self._open(index, row)


def test_a_picture_is_read_again_when_the_disk_stumbles(index, monkeypatch, caplog) -> None:
    expected = tiny.dataset(index, tiny.rule(), is_training=True)[0, 3]
    disk = FailingDisk(monkeypatch, number=errno.EIO, times=2)
    sample = tiny.dataset(index, tiny.rule(), is_training=True)[0, 3]
    assert not differences(sample, expected)
    assert disk.pauses == [1.0, 5.0]
    assert not caplog.records


def test_a_picture_that_the_disk_never_gives_is_left_out(index, monkeypatch, caplog) -> None:
    FailingDisk(monkeypatch, number=errno.EIO, times=3)
    sample = tiny.dataset(index, tiny.rule(), is_training=True)[0, 3]
    assert sample["image_id"] == index.image_ids[4]
    assert "the disk says no" in caplog.text


def test_a_machine_without_free_files_leaves_no_picture_out(index, monkeypatch) -> None:
    disk = FailingDisk(monkeypatch, number=errno.EMFILE, times=1)
    dataset = tiny.dataset(index, tiny.rule(), is_training=True)
    with pytest.raises(OSError, match="the disk says no"):
        dataset[0, 3]
    assert disk.pauses == []
    assert dataset[0, 3]["image_id"] == index.image_ids[3]


def missing_views(index: CocoIndex, folder: Path, *, is_error: bool = False) -> MissingViews:
    rule = tiny.rule()
    channels, *sides = rule.latent_shape
    cache = MomentsCache(
        folder, image_ids=index.image_ids, moments_shape=(2 * channels, sides[0], sides[1])
    )
    return MissingViews(
        index,
        train_rows=np.arange(len(index)),
        val_rows=np.arange(0),
        rule=rule,
        cache=cache,
        unreadable=UnreadablePictures(len(index), known=[2], is_error=is_error),
    )


def test_missing_views_wait_for_a_disk_that_stumbles(index, monkeypatch, tmp_path) -> None:
    disk = FailingDisk(monkeypatch, number=errno.EIO, times=2)
    assert len(missing_views(index, tmp_path)[3]) == len(tiny.rule().views)
    assert disk.pauses == [1.0, 5.0]


def test_an_unreadable_picture_has_no_missing_views_and_is_named_once(
    index, monkeypatch, tmp_path, caplog
) -> None:
    views = missing_views(index, tmp_path)
    FailingDisk(monkeypatch, number=errno.EIO, times=10)
    assert [views[2], views[3], views[3]] == [[], [], []]
    assert caplog.text.count("left out: ") == 1, "the second one was named at the start"


def test_an_error_from_a_loader_process_is_told_without_its_traceback(
    index, monkeypatch, tmp_path
) -> None:
    FailingDisk(monkeypatch, number=errno.ENOENT, times=10)
    views = missing_views(index, tmp_path, is_error=True)
    loader = torch.utils.data.DataLoader(views, batch_size=None, sampler=[3], num_workers=1)
    with pytest.raises(UnreadablePictureError) as caught:
        list(loader)
    path = str(index.image_path(3))
    assert str(caught.value) == f"--strict_data: [Errno 2] the disk says no: {path!r}"


def test_one_of_our_own_faults_is_no_unreadable_picture(index, monkeypatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setattr(data, "draw_mask", fail)
    with pytest.raises(ValueError, match="a fault of ours"):
        tiny.dataset(index, tiny.rule(), is_training=True)[0, 0]


# ---- with a cache of the VAE's moments


@pytest.fixture
def cache(tmp_path, index) -> MomentsCache:
    return MomentsCache(
        tmp_path / "latents", image_ids=index.image_ids, moments_shape=(8, 8, 8)
    )  # fmt: skip


@pytest.mark.parametrize("is_training", [True, False])
def test_a_cache_adds_moments_and_changes_nothing_else(index, cache, is_training) -> None:
    plain = tiny.dataset(index, tiny.rule(), is_training=is_training)
    cached = tiny.dataset(index, tiny.rule(), is_training=is_training, moments_cache=cache)
    missed = cached[3, 1]
    assert missed.keys() - plain[3, 1].keys() == {"moments", "slot"}
    assert not missed["moments"].any()
    slot = Slot(*missed["slot"].tolist())
    assert slot.view == 0 if not is_training else slot.view in (1, 2)
    moments = np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float16)
    cache.write(slot, moments)
    hit = cached[3, 1]
    assert Slot(*hit["slot"].tolist()) == NO_SLOT
    assert hit["moments"].numpy().tobytes() == moments.tobytes()
    assert Slot(*cached[3, 2]["slot"].tolist()) != NO_SLOT, "another picture is still missing"
    for sample in (missed, hit):
        del sample["moments"], sample["slot"]
        assert not differences(sample, plain[3, 1])


def test_a_picture_that_changes_is_encoded_anew(tmp_path) -> None:
    pictures = [np.full((64, 64, 3), 40 * i, np.uint8) for i in range(1, 3)]
    index = write_coco(tmp_path, pictures, [[8, 8, 30, 30]] * 2)
    cache = MomentsCache(
        tmp_path / "latents", image_ids=index.image_ids, moments_shape=(8, 8, 8)
    )  # fmt: skip
    dataset = tiny.dataset(index, tiny.rule(), is_training=False, moments_cache=cache)
    for position in (0, 1):
        slot = Slot(*dataset[0, position]["slot"].tolist())
        cache.write(slot, np.zeros((8, 8, 8), np.float16))
    pictures[0][63, 63, 0] += 1
    Image.fromarray(pictures[0]).save(tmp_path / "images" / "1.png")
    assert Slot(*dataset[0, 0]["slot"].tolist()) != NO_SLOT
    assert Slot(*dataset[0, 1]["slot"].tolist()) == NO_SLOT
