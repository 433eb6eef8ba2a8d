"""The cache of the VAE's moments: what is a hit, what a miss, and what survives."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from inpainting import latents
from inpainting.latents import (
    MomentsCache,
    Slot,
    cache_key,
    hash_encoder,
    round_moments,
    tag_pixels,
)
from tests import tiny

SHAPE = (8, 4, 4)
IDS = np.array([3, 7, 2**40], dtype=np.int64)


def open_cache(folder: Path, ids: np.ndarray = IDS, *, min_free_bytes: int = 0) -> MomentsCache:
    return MomentsCache(
        folder, image_ids=ids, moments_shape=SHAPE, min_free_bytes=min_free_bytes
    )  # fmt: skip


def moments_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float16)


def assert_holds(cache: MomentsCache, slot: Slot, expected: np.ndarray) -> None:
    got = cache.read(slot)
    assert got is not None
    assert got.tobytes() == expected.tobytes()


def test_what_was_written_comes_back_in_other_processes_and_runs(tmp_path) -> None:
    cache = open_cache(tmp_path / "cache")
    slots = [
        cache.slot(row, view=view, tag=10 * row + view) for row in range(3) for view in (0, 1, 2)
    ]
    assert all(cache.read(slot) is None for slot in slots)
    for seed, slot in enumerate(slots):
        cache.write(slot, moments_of(seed))
    for reader in (cache, pickle.loads(pickle.dumps(cache)), open_cache(tmp_path / "cache")):
        for seed, slot in enumerate(slots):
            assert_holds(reader, slot, moments_of(seed))
    moments = cache.read(slots[0])
    assert moments is not None
    moments[0, 0, 0] = 1  # a batch is made of it


def test_another_process_opens_the_files_itself(tmp_path) -> None:
    cache = open_cache(tmp_path)
    slot = cache.slot(0, view=1, tag=5)
    cache.write(slot, moments_of(0))
    copied = pickle.loads(pickle.dumps(cache))
    for descriptor in cache._files.values():
        os.close(descriptor)  # a loader worker that isn't forked hasn't got them
    assert_holds(copied, slot, moments_of(0))


def test_a_picture_keeps_its_slot_when_others_come_and_go(tmp_path) -> None:
    before = open_cache(tmp_path)
    before.write(before.slot(1, view=1, tag=5), moments_of(0))
    after = open_cache(tmp_path, np.array([1, 7, 9]))
    assert_holds(after, after.slot(1, view=1, tag=5), moments_of(0))
    assert after.read(after.slot(0, view=1, tag=5)) is None
    numbers = {open_cache(tmp_path).slot(row, view=0, tag=0).picture for row in range(3)}
    numbers |= {after.slot(row, view=0, tag=0).picture for row in range(3)}
    assert numbers == set(range(5)), "ids 3, 7, 2**40, 1, 9"


def test_a_stale_slot_is_a_miss_and_is_renewed(tmp_path) -> None:
    cache = open_cache(tmp_path)
    cache.write(cache.slot(0, view=1, tag=5), moments_of(0))
    changed = cache.slot(0, view=1, tag=6)
    assert cache.read(changed) is None
    cache.write(changed, moments_of(1))
    assert_holds(cache, changed, moments_of(1))
    assert cache.read(cache.slot(0, view=1, tag=5)) is None


@pytest.mark.parametrize("fault", ["cut", "flipped", "zeroed", "emptied", "header only"])
def test_a_torn_slot_is_a_miss_and_is_repaired(tmp_path, fault: str) -> None:
    cache = open_cache(tmp_path)
    slots = [cache.slot(row, view=1, tag=row + 1) for row in range(3)]
    for row, slot in enumerate(slots):
        cache.write(slot, moments_of(row))
    (path,) = tmp_path.glob("*.moments")
    content = bytearray(path.read_bytes())
    size = len(content) // 3
    if fault == "cut":
        content = content[:-1]
    elif fault == "flipped":
        content[-7] ^= 1
    elif fault == "zeroed":
        content[-size:] = bytes(size)
    elif fault == "emptied":
        content.clear()
    else:
        content = content[: 2 * size + 16]
    path.write_bytes(content)
    assert cache.read(slots[2]) is None
    if fault != "emptied":
        assert_holds(cache, slots[1], moments_of(1))
    cache.write(slots[2], moments_of(2))
    assert_holds(open_cache(tmp_path), slots[2], moments_of(2))


def test_a_torn_list_of_ids_costs_hits_and_nothing_else(tmp_path) -> None:
    cache = open_cache(tmp_path)
    cache.write(cache.slot(0, view=1, tag=5), moments_of(0))
    (tmp_path / "image_ids.npy").write_bytes(b"torn")
    again = open_cache(tmp_path, IDS[1:])
    assert again.read(again.slot(0, view=1, tag=6)) is None, "another picture's moments"
    again.write(again.slot(0, view=1, tag=6), moments_of(1))
    assert_holds(open_cache(tmp_path, IDS[1:]), again.slot(0, view=1, tag=6), moments_of(1))


def test_a_full_disk_turns_writing_off_in_one_line(tmp_path, monkeypatch, caplog) -> None:
    cache = open_cache(tmp_path)
    kept, torn = (cache.slot(row, view=1, tag=row) for row in range(2))
    cache.write(kept, moments_of(0))
    written: list[int] = []

    def fill_up(descriptor: int, record: memoryview, offset: int) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(pwrite(descriptor, record[:20], offset))
        return 20

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", fill_up)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            cache.write(torn, moments_of(1))
    assert [r.getMessage() for r in caplog.records] == [
        f"latents: no more are kept in {tmp_path}: {os.strerror(errno.ENOSPC)}"
    ]
    assert cache.read(torn) is None, "half a slot"
    assert_holds(cache, kept, moments_of(0))


def test_a_write_that_the_system_cuts_short_goes_on(tmp_path, monkeypatch) -> None:
    cache = open_cache(tmp_path)
    slot, pwrite = cache.slot(1, view=1, tag=5), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, record, offset: pwrite(fd, record[:100], offset))
    cache.write(slot, moments_of(0))
    assert_holds(cache, slot, moments_of(0))


def test_writing_ends_where_the_disk_must_stay_free(tmp_path, monkeypatch, caplog) -> None:
    cache = open_cache(tmp_path, min_free_bytes=1000)
    monkeypatch.setattr(latents, "free_bytes", lambda folder: 1000)
    cache.write(cache.slot(0, view=1, tag=5), moments_of(0))
    monkeypatch.setattr(latents, "free_bytes", lambda folder: 999)
    cache.write(cache.slot(1, view=1, tag=5), moments_of(1))
    assert cache.read(cache.slot(0, view=1, tag=5)) is not None
    assert cache.read(cache.slot(1, view=1, tag=5)) is None
    assert "half of the free disk is used" in caplog.text


def test_a_folder_that_cannot_be_made_leaves_a_cache_of_misses(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("")
    cache = open_cache(tmp_path / "file" / "cache")
    assert "no more are kept" in caplog.text
    slot = cache.slot(0, view=1, tag=5)
    cache.write(slot, moments_of(0))
    assert cache.read(slot) is None
    assert cache.stored_bytes() == 0


def test_a_full_cache_takes_what_was_announced(tmp_path) -> None:
    cache = open_cache(tmp_path)
    for row in range(3):
        for view in (1, 2):
            cache.write(cache.slot(row, view=view, tag=5), moments_of(row))
    sizes = sum(path.stat().st_size for path in tmp_path.glob("*.moments"))
    assert cache.full_bytes(num_slots=6) == sizes == 6 * (16 + 2 * 8 * 4 * 4)


def test_a_tag_belongs_to_the_pixels(tmp_path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    changed = image.copy()
    changed[7, 7, 2] ^= 1
    tags = {tag_pixels(image), tag_pixels(changed), tag_pixels(image[:, ::-1])}
    assert len(tags) == 3
    assert tag_pixels(image.copy()) in tags
    assert all(-(2**63) <= tag < 2**63 for tag in tags)


def test_the_key_tells_encoders_and_settings_apart(tmp_path) -> None:
    vae = tiny.base().vae
    encoder = hash_encoder(vae)
    assert encoder == hash_encoder(tiny.base().vae)
    with torch.no_grad():
        next(vae.decoder.parameters()).add_(1)
        assert hash_encoder(vae) == encoder, "the decoder encodes nothing"
        next(vae.quant_conv.parameters()).flatten()[0] *= 1.001
    assert hash_encoder(vae) != encoder
    plain = {
        "image_dir": tmp_path, "encoder": encoder, "dtype": torch.float32, "device_type": "cpu",
        "image_size": 64,
    }  # fmt: skip
    others = [
        {"image_dir": tmp_path / "other"}, {"encoder": hash_encoder(vae)},
        {"dtype": torch.bfloat16}, {"device_type": "gpu"}, {"image_size": 128},
    ]  # fmt: skip
    keys = {cache_key(**(plain | other)) for other in [{}, *others]}
    assert len(keys) == len(others) + 1


def test_moments_are_rounded_and_nan_is_refused() -> None:
    moments = torch.tensor([[[1.0001, -30.0]]])
    assert round_moments(moments).tolist() == [[[1.0, -30.0]]]
    with pytest.raises(FloatingPointError, match="must encode a picture to finite moments"):
        round_moments(torch.tensor([[[70_000.0]]]))
