"""What the flags make of a run, apart from what the integration tests see."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_run
from inpainting.flags import build_parser
from inpainting.latents import MomentsCache
from tests import tiny


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def flags(*extra: str) -> argparse.Namespace:
    return build_parser().parse_args(
        ["--image_size", "64", "--precision", "32", "--accelerator", "cpu", *extra]
    )


def open_cache(*extra: str) -> MomentsCache | None:
    return lightning_run.open_moments_cache(
        flags(*extra), base=tiny.base(), index=tiny.coco_index()
    )


def test_auto_leaves_half_of_what_would_be_free_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightning_run, "free_bytes", lambda folder: 1_000_000)
    cache = open_cache()
    assert cache is not None
    assert cache.folder.parent == tmp_path / "xdg" / "controlnet-inpainting" / "latents"
    assert cache.min_free_bytes == 500_000
    for view in range(3):
        cache.write(cache.slot(0, view=view, tag=5), np.zeros((8, 8, 8), np.float16))
    stored = cache.stored_bytes()
    assert stored >= 3 * 1040
    again = open_cache()
    assert again is not None
    assert again.min_free_bytes == (1_000_000 + stored) // 2, "a restart takes no second half"


def test_a_named_folder_may_be_filled_and_off_is_none(tmp_path: Path) -> None:
    named = open_cache("--cache_latents", str(tmp_path / "latents"))
    assert named is not None
    assert named.folder.parent == tmp_path / "latents"
    assert named.min_free_bytes == 0
    assert open_cache("--cache_latents", "off") is None


def test_settings_that_change_the_moments_get_a_cache_of_their_own() -> None:
    caches = [open_cache(), open_cache("--precision", "bf16-mixed"),
              open_cache("--image_size", "128"), open_cache("--accelerator", "gpu")]  # fmt: skip
    assert len({cache.folder for cache in caches if cache}) == 4
    same = open_cache("--seed", "7", "--num_crops", "3", "--batch_size", "9")
    assert same is not None
    assert caches[0] is not None
    assert same.folder == caches[0].folder


@pytest.mark.parametrize(("free", "has_room"), [(2 * 1040, True), (2 * 1040 - 1, False)])
def test_a_disk_without_room_is_announced(
    free: int, has_room: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lightning_run, "free_bytes", lambda folder: free)
    cache = open_cache()
    assert cache is not None
    cache.min_free_bytes = 0
    with caplog.at_level(logging.INFO):
        lightning_run.describe_moments_cache(cache, num_slots=2)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("latents: 0.00 GB when all are kept, 0.00 GB are there: ")
    assert (len(lines) == 1) == has_room
    assert has_room or "the disk has room for" in lines[1]


@pytest.mark.parametrize(("devices", "first"), [(-1, 0), (2, 0), ([3, 1], 3)])
def test_a_gpu_is_named_by_the_first_that_the_run_uses(devices, first, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    args = argparse.Namespace(accelerator="gpu", devices=devices)
    assert lightning_run.name_device(args) == f"GPU {first}"
