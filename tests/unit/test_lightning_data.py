"""Which pictures train, in what order, and from where on: by ids, seed, epoch and samples alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from inpainting.coco import CocoIndex
from inpainting.unreadable import UnreadablePictures
from lightning_data import (
    CountUnreadable,
    EpochBatchSampler,
    EpochLoader,
    FixedBatchSampler,
    InpaintingDataModule,
    ResumePosition,
    split_rows,
)
from tests import tiny


def sampler(
    *,
    num_samples: int = 50,
    batch_size: int = 4,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
    seed: int = 42,
    epoch: int = 0,
    num_consumed: int = 0,
) -> EpochBatchSampler:
    result = EpochBatchSampler(
        num_samples=num_samples,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        accumulate_grad_batches=accumulate,
        seed=seed,
    )
    result.epoch, result.num_consumed = epoch, num_consumed
    return result


def positions(batches) -> list[int]:
    return [position for batch in batches for _, position in batch]


# ---- the split


def test_each_picture_is_on_one_side_and_the_share_is_kept() -> None:
    ids = np.arange(1000) * 7
    train, val = split_rows(ids, val_split=0.05)
    assert (len(train), len(val)) == (950, 50)
    assert sorted([*train, *val]) == list(range(1000))
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()


def test_the_split_follows_the_ids_not_their_order() -> None:
    ids = np.random.default_rng(0).choice(10**6, 200, replace=False)
    _, val = split_rows(ids, val_split=0.1)
    shuffled = np.random.default_rng(1).permutation(ids)
    _, other = split_rows(shuffled, val_split=0.1)
    assert set(ids[val]) == set(shuffled[other])


def test_the_split_is_the_same_in_every_version() -> None:
    _, val = split_rows(np.arange(20), val_split=0.2)
    assert val.tolist() == VAL_OF_TWENTY


# Written down once: a change would move validation pictures into old runs' training data.
VAL_OF_TWENTY = [8, 9, 13, 17]


def test_more_pictures_move_few_from_training_to_validation() -> None:
    ids = np.arange(1000)
    before = set(split_rows(ids, val_split=0.1)[1])
    after = split_rows(np.arange(1010), val_split=0.1)[1]
    stayed = len(before & {int(ids[row]) for row in after if row < 1000})
    assert stayed >= 95, f"{stayed} of 100 pictures still validate"


@pytest.mark.parametrize(("share", "num_val"), [(0.0, 0), (0.001, 1), (0.5, 5), (0.999, 9)])
def test_a_split_never_leaves_a_side_empty_that_was_asked_for(share, num_val) -> None:
    train, val = split_rows(np.arange(10), val_split=share)
    assert (len(train), len(val)) == (10 - num_val, num_val)


# ---- the order


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = positions(sampler(epoch=3))
    torch.manual_seed(5)
    again = sampler(epoch=0)
    list(again)
    again.epoch = 3
    assert positions(again) == first
    assert positions(sampler(epoch=3, batch_size=8)) == first[:48]
    assert positions(sampler(epoch=4)) != first
    assert positions(sampler(epoch=3, seed=43)) != first
    assert all(epoch == 3 for batch in sampler(epoch=3) for epoch, _ in batch)


def test_an_epoch_shows_each_picture_at_most_once_in_a_drawn_order() -> None:
    order = positions(sampler(num_samples=48))
    assert sorted(order) == list(range(48))
    assert order != list(range(48))


@pytest.mark.parametrize("num_consumed", [0, 16])
def test_the_ranks_together_take_one_processs_batches(num_consumed: int) -> None:
    whole = list(sampler(batch_size=8, num_consumed=num_consumed))
    ranks = [
        list(sampler(batch_size=2, rank=rank, world_size=4, num_consumed=num_consumed))
        for rank in range(4)
    ]
    together = [[p for block in blocks for p in block] for blocks in zip(*ranks, strict=True)]
    assert together == whole
    assert whole


@pytest.mark.parametrize(("batch_size", "world_size", "accumulate"), [(4, 1, 3), (2, 3, 2)])
def test_an_epoch_is_cut_to_whole_effective_batches(batch_size, world_size, accumulate) -> None:
    one = sampler(
        num_samples=59, batch_size=batch_size, world_size=world_size, accumulate=accumulate
    )
    assert one.epoch_size == 48  # of 59, in effective batches of 12
    assert len(one) == len(list(one)) == 48 // (batch_size * world_size)
    assert len(one) % accumulate == 0
    assert {len(batch) for batch in one} == {batch_size}


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (8, 1), (2, 1), (2, 2), (1, 4)])
def test_a_resume_goes_on_with_the_very_next_sample(batch_size: int, world_size: int) -> None:
    straight = positions(sampler(num_samples=48, epoch=2))
    ranks = [
        list(
            sampler(
                num_samples=48,
                epoch=2,
                batch_size=batch_size,
                rank=rank,
                world_size=world_size,
                num_consumed=16,
            )
        )
        for rank in range(world_size)
    ]
    rest = [p for blocks in zip(*ranks, strict=True) for p in positions(blocks)]
    assert rest == straight[16:]


def test_a_batch_size_that_doesnt_divide_the_rest_repeats_no_sample() -> None:
    one = sampler(num_samples=50, batch_size=5, num_consumed=12)
    rest = positions(one)
    done = positions(sampler(num_samples=50))[:12]
    assert len(rest) == 35 == one.num_remaining * 5
    assert not set(rest) & set(done)
    assert len(one) == 10, "Lightning counts the whole epoch"


def test_a_finished_epoch_has_nothing_left() -> None:
    assert list(sampler(num_consumed=48)) == []
    assert list(sampler(num_consumed=50)) == []


def test_too_few_pictures_for_one_step_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one effective batch \(24 = .*, got 20 pic.*Lower --bat"):
        sampler(num_samples=20, batch_size=4, world_size=3, accumulate=2)
    assert len(sampler(num_samples=24, batch_size=4, world_size=3, accumulate=2)) == 2


@pytest.mark.parametrize(("num_samples", "world_size"), [(7, 1), (8, 2), (9, 2), (1, 3), (3, 4)])
def test_validation_covers_every_picture_with_equally_many_full_batches(
    num_samples: int, world_size: int
) -> None:
    ranks = [
        list(
            FixedBatchSampler(
                num_samples=num_samples, batch_size=2, rank=rank, world_size=world_size
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) == 2 for batches in ranks for batch in batches)
    seen = [p for batches in ranks for p in positions(batches)]
    assert set(seen) == set(range(num_samples))
    assert {epoch for batches in ranks for batch in batches for epoch, _ in batch} == {0}


# ---- the loaders


@pytest.fixture(scope="module")
def index() -> CocoIndex:
    return tiny.coco_index()


def datamodule(
    index: CocoIndex,
    *,
    batch_size: int = 2,
    num_workers: int = 0,
    val_split: float = 0.25,
    overfit_batches: int = 0,
    epoch: int = 0,
    num_consumed: int = 0,
) -> InpaintingDataModule:
    position = ResumePosition()
    position.num_consumed = num_consumed
    module = InpaintingDataModule(
        index,
        tokenizer=tiny.tokenizer(),
        rule=replace(tiny.rule(), mask_types={"irregular": 1.0}),
        batch_size=batch_size,
        num_workers=num_workers,
        val_split=val_split,
        accumulate_grad_batches=1,
        overfit_batches=overfit_batches,
        position=position,
        moments_cache=None,
        unreadable=UnreadablePictures(len(index), is_error=False),
    )
    module.trainer = SimpleNamespace(  # type: ignore[assignment]
        current_epoch=epoch,
        global_rank=0,
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return module


def assert_same_batches(got: list, expected: list) -> None:
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        for name, value in one.items():
            same = torch.equal(value, other[name]) if torch.is_tensor(value) else True
            assert same, f"{name} differs"
        assert one["prompt"] == other["prompt"]


def test_workers_change_nothing_of_an_epoch(index) -> None:
    alone = list(datamodule(index, num_workers=0, epoch=1, num_consumed=2).train_dataloader())
    helped = list(datamodule(index, num_workers=2, epoch=1, num_consumed=2).train_dataloader())
    assert_same_batches(helped, alone)


def expected_batches(module: InpaintingDataModule, *, epoch: int) -> list:
    batches = module.train_sampler(rank=0, world_size=1)
    batches.epoch = epoch
    return [default_collate([module.train_set[a] for a in addresses]) for addresses in batches]


def test_the_loader_asks_for_epoch_and_position_when_its_first_batch_is_taken(index) -> None:
    module = datamodule(index)
    loader = module.train_dataloader()
    assert isinstance(loader, EpochLoader)
    iterator = iter(loader)
    module.trainer.current_epoch = 3  # type: ignore[misc]
    module.position.num_consumed = 4
    assert_same_batches(list(iterator), expected_batches(module, epoch=3)[2:])


def test_persistent_workers_see_the_next_epoch(index) -> None:
    module = datamodule(index, num_workers=1)
    loader = module.train_dataloader()
    for epoch in range(2):
        module.trainer.current_epoch = epoch  # type: ignore[misc]
        assert_same_batches(list(loader), expected_batches(module, epoch=epoch))


@pytest.fixture
def index_with_a_bad_picture(tmp_path: Path) -> CocoIndex:
    folder = shutil.copytree(tiny.coco_folder() / "images", tmp_path / "images")
    index = CocoIndex.from_annotations(
        folder,
        ann_file=tiny.coco_folder() / "annotations" / "instances.json",
        cache_dir=tmp_path / "cache",
    )
    index.image_path(3).write_bytes(b"")
    return index


def test_loader_processes_leave_the_same_pictures_out_and_share_what_they_know(
    index_with_a_bad_picture: CocoIndex,
) -> None:
    alone = datamodule(index_with_a_bad_picture, val_split=0.0)
    helped = datamodule(index_with_a_bad_picture, val_split=0.0, num_workers=2)
    assert_same_batches(list(helped.train_dataloader()), list(alone.train_dataloader()))
    for module in (alone, helped):
        assert module.unreadable.flags.nonzero().flatten().tolist() == [3]


def test_an_epochs_end_tells_the_number_of_unreadable_pictures_once(
    index: CocoIndex, caplog: pytest.LogCaptureFixture
) -> None:
    unreadable = UnreadablePictures(len(index), is_error=False)
    counter = CountUnreadable(unreadable)
    found_elsewhere = torch.zeros(len(index), dtype=torch.int32)
    found_elsewhere[5] = 1
    trainer = SimpleNamespace(
        is_global_zero=True,
        strategy=SimpleNamespace(
            root_device=torch.device("cpu"), reduce=lambda flags, reduce_op: flags + found_elsewhere
        ),
    )
    unreadable.add(2, ValueError("bad"))
    caplog.clear()
    for _ in range(2):
        counter.on_train_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert caplog.messages == [
        "warning: 2 of 12 pictures can't be read: each one's neighbour takes its place"
    ]
    unreadable.add(5, ValueError("bad"))  # named by another rank already
    assert len(caplog.messages) == 1


def test_training_and_validation_share_no_picture(index) -> None:
    module = datamodule(index)
    ids = [
        {int(i) for batch in loader for i in batch["image_id"]}
        for loader in (module.train_dataloader(), module.val_dataloader())
    ]
    assert not ids[0] & ids[1]
    assert len(ids[1]) == 3
    assert len(ids[0]) == 8  # nine train, one is left over by batches of two


def test_without_a_split_there_is_no_validation_loader(index) -> None:
    assert datamodule(index, val_split=0.0).val_dataloader() == []


def test_fewer_validation_pictures_than_a_batch_make_one_batch_of_them(index) -> None:
    loader = datamodule(index, batch_size=8).val_dataloader()
    assert [len(batch["image_id"]) for batch in loader] == [3]


def test_overfitting_validates_on_what_it_trains_on(index) -> None:
    module = datamodule(index, overfit_batches=2)
    trained = [int(i) for batch in module.train_dataloader() for i in batch["image_id"]]
    validated = {int(i) for batch in module.val_dataloader() for i in batch["image_id"]}
    assert len(trained) == 4
    assert set(trained) == validated


def test_overfitting_on_more_batches_than_there_are_takes_all_pictures(index) -> None:
    module = datamodule(index, overfit_batches=10, val_split=0.0)
    ids = [int(i) for batch in module.train_dataloader() for i in batch["image_id"]]
    assert sorted(ids) == sorted(index.image_ids.tolist())
    assert module.val_dataloader() == []


def test_a_checkpoint_keeps_the_number_of_consumed_samples() -> None:
    position = ResumePosition()
    position.num_consumed, position._epoch = 12, 3
    restored = ResumePosition()
    restored.load_state_dict(position.state_dict())
    assert restored.num_consumed == 12
    assert position.state_dict() == {"epoch": 3, "num_consumed": 12}
