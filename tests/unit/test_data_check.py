"""--check: what the sheet of samples shows, and the exit code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data_check import check_data
from inpainting.contact_sheet import CELL_PX, GAP_PX, LINE_PX
from inpainting.flags import build_parser
from inpainting.images import resize_image

NUM_CROPS = 3


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    """Twelve wide pictures of noise: no two crops look alike."""
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(256, size=(12, CELL_PX, 3 * CELL_PX, 3))
    for number, pixels in enumerate(noise.astype(np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number:012d}.png")
    return folder


def flags(image_dir: Path, *extra: str) -> argparse.Namespace:
    folder = image_dir.parent / "outputs"
    return build_parser().parse_args(
        ["--image_dir", str(image_dir), "--image_size", str(CELL_PX), "--output_dir", str(folder),
         "--mask_types", "irregular", *extra]
    )  # fmt: skip


def shown_views(image_dir: Path) -> set[int]:
    """Return which view of its picture each line of the sheet shows."""
    folder = image_dir.parent / "outputs" / "data_check"
    sheet = np.asarray(Image.open(folder / "samples.png"))
    samples = json.loads((folder / "faults.json").read_text())["summary"]["samples"]
    views = set()
    for line, sample in enumerate(samples):
        top = LINE_PX + GAP_PX + line * (CELL_PX + GAP_PX)
        picture = Image.open(image_dir / sample["file_name"])
        cuts = {}
        for view in range(1, 1 + 2 * NUM_CROPS):
            box, flip = data.place_view(view, picture=picture, image_id=sample["image_id"])
            cuts[view] = resize_image(picture, box=box, size=CELL_PX, flip=flip)
        cell = sheet[top : top + CELL_PX, :CELL_PX]
        (view,) = [view for view, cut in cuts.items() if np.array_equal(cut, cell)]
        views.add(view)
    return views


def test_the_sheet_shows_every_crop_that_is_trained_on(image_dir: Path) -> None:
    assert check_data(flags(image_dir, "--num_crops", str(NUM_CROPS))) == 0
    assert len({(view - 1) // 2 for view in shown_views(image_dir)}) == NUM_CROPS
    assert check_data(flags(image_dir)) == 0
    assert shown_views(image_dir) == {1, 2}, "one crop and its mirror image"


def test_a_bad_picture_is_not_shown_and_the_code_is_1(image_dir: Path) -> None:
    (image_dir / f"{3:012d}.png").write_bytes(b"")
    assert check_data(flags(image_dir, "--num_crops", str(NUM_CROPS))) == 1
    folder = image_dir.parent / "outputs" / "data_check"
    summary = json.loads((folder / "faults.json").read_text())["summary"]
    assert {sample["image_id"] for sample in summary["samples"]} == set(range(12)) - {3}
