"""The fills that have learned nothing: what they keep, and what they may not see."""

from __future__ import annotations

import numpy as np
import pytest

from inpainting.classic_fills import fill_mean_color, fill_navier_stokes, fill_telea
from inpainting.metrics import num_changed_known

FILLS = (fill_telea, fill_navier_stokes, fill_mean_color)
HOLES = {
    "middle": (slice(20, 40), slice(20, 40)),
    "corner": (slice(0, 30), slice(0, 20)),
    "side": (slice(0, 64), slice(50, 64)),
    "last column": (slice(0, 64), slice(63, 64)),
    "across": (slice(0, 64), slice(10, 30)),
}


def hole(name: str) -> np.ndarray:
    mask = np.zeros((64, 64), np.uint8)
    mask[HOLES[name]] = 1
    return mask


def ramp() -> np.ndarray:
    y, x = np.mgrid[:64, :64]
    return np.stack([2 * x + y, 3 * y, 190 - 2 * x - y], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", HOLES)
@pytest.mark.parametrize("fill", FILLS)
def test_what_lies_under_the_hole_changes_no_bit(fill, name: str) -> None:
    image, mask = ramp(), hole(name)
    filled = fill(image, mask=mask)
    for under in (0, 255, np.random.default_rng(0).integers(0, 256, (int(mask.sum()), 3))):
        other = image.copy()
        other[mask == 1] = under
        np.testing.assert_array_equal(fill(other, mask=mask), filled)


@pytest.mark.parametrize("name", HOLES)
@pytest.mark.parametrize("fill", FILLS)
def test_known_pixels_stay_as_they_are(fill, name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    before, mask = image.copy(), hole(name)
    filled = fill(image, mask=mask)
    assert filled.dtype == np.uint8
    assert num_changed_known(filled, image=before, mask=mask) == 0
    np.testing.assert_array_equal(image, before)
    assert not np.array_equal(filled, before), "nothing was filled"


@pytest.mark.parametrize("name", HOLES)
@pytest.mark.parametrize("fill", FILLS)
def test_a_flat_picture_is_filled_with_its_colour(fill, name: str) -> None:
    image, mask = np.full((64, 64, 3), (10, 130, 250), np.uint8), hole(name)
    holed = image.copy()
    holed[mask == 1] = 0
    # OpenCV's Telea rounds each pixel and goes on from there: it strays by some grey levels.
    atol = 6 if fill is fill_telea else 0
    np.testing.assert_allclose(fill(holed, mask=mask), image, atol=atol)


@pytest.mark.parametrize("fill", [fill_telea, fill_navier_stokes])
def test_a_ramp_is_continued(fill) -> None:
    image, mask = ramp(), hole("middle")
    error = np.abs(fill(image, mask=mask).astype(int) - image)[mask == 1].mean()
    flat = np.abs(fill_mean_color(image, mask=mask).astype(int) - image)[mask == 1].mean()
    assert error < 0.6 * flat, (error, flat)


def test_telea_and_navier_stokes_are_two_methods() -> None:
    image, mask = ramp(), hole("middle")
    assert not np.array_equal(fill_telea(image, mask=mask), fill_navier_stokes(image, mask=mask))


def test_the_mean_colour_is_that_of_the_ring() -> None:
    image, mask = np.full((64, 64, 3), 255, np.uint8), hole("middle")
    image[18:42, 18:42] = 99  # one more pixel than the ring reaches at this size
    image[19, 20:40] = (10, 20, 30)  # 20 of the ring's 80 pixels
    filled = fill_mean_color(image, mask=mask)
    expected = [round((20 * dark + 60 * 99) / 80) for dark in (10, 20, 30)]
    assert np.unique(filled[mask == 1], axis=0).tolist() == [expected]


def test_the_ring_grows_with_the_picture() -> None:
    mask = np.zeros((512, 512), np.uint8)
    mask[100:200, 100:200] = 1
    image = np.zeros((512, 512, 3), np.uint8)
    image[92:208, 92:208] = 200  # just as wide as the ring
    assert (fill_mean_color(image, mask=mask)[mask == 1] == 200).all()
    image[92:208, 92] = 0  # its outermost column
    assert (fill_mean_color(image, mask=mask)[mask == 1] < 200).all()
