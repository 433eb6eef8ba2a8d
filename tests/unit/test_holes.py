from __future__ import annotations

import numpy as np
import pytest
import torch

from inpainting import holes


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 94, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((70, 94), dtype=np.uint8)
    mask[20:45, 30:61] = 1
    return mask


def area_of(height: int, width: int, *, image_size: int = 64) -> holes.WorkingArea:
    return holes.working_area(
        np.ones((height, width), dtype=np.uint8),
        image_size=image_size, multiple=16, crop_to_mask=False, context_px=32,
    )  # fmt: skip


# Geometry


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 100), (333, 500), (17, 11), (50, 49)])
def test_short_side_gets_the_working_size_and_the_aspect_is_kept(height: int, width: int) -> None:
    area = area_of(height, width)

    assert min(area.size) == 64
    assert abs(area.size[0] / area.size[1] - width / height) <= 0.5 / 64 * width / height
    assert all(
        padded % 16 == 0 and 0 <= padded - side < 16
        for padded, side in zip(area.padded_size, area.size, strict=True)
    )


@pytest.mark.parametrize(("height", "width"), [(64, 90), (128, 201), (40, 33)])
def test_working_pixels_come_back_to_where_they_were(height: int, width: int) -> None:
    area = area_of(height, width)
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(20, 220, width)[None]
    ramp[..., 1] = np.linspace(20, 220, height)[:, None]

    returned = holes.from_working(holes.to_working(ramp, area=area), area=area)

    inner = np.s_[3:-3, 3:-3]  # a resize has no neighbours beyond the border
    assert np.abs(returned[inner].astype(int) - ramp[inner]).max() <= 2


def test_padding_mirrors_picture_and_hole_alike(image: np.ndarray) -> None:
    mask = np.zeros((70, 94), dtype=np.uint8)
    mask[:, -6:] = 1
    area = holes.working_area(mask, image_size=70, multiple=16, crop_to_mask=False, context_px=32)
    working = holes.to_working(image, area=area)
    working_mask = holes.mask_to_working(mask, area=area)

    assert working.shape == (80, 96, 3)
    assert np.array_equal(working[:70, :94], image)
    assert np.array_equal(working[:70, 94:], image[:, [92, 91]])
    assert np.array_equal(working[70:, :94], image[68:58:-1])
    assert working_mask[:, 88:].all()
    assert not working_mask[:, :88].any()


def test_crop_holds_the_hole_with_its_context_inside_the_picture() -> None:
    mask = np.zeros((400, 600), dtype=np.uint8)
    mask[10:20, 200:300] = 1
    area = holes.working_area(mask, image_size=64, multiple=16, crop_to_mask=True, context_px=32)

    assert (area.rows, area.columns) == (slice(0, 70), slice(150, 350))
    assert area.size == (183, 64)


def test_a_hole_of_one_pixel_survives_the_resize_and_the_cells() -> None:
    mask = np.zeros((1000, 1000), dtype=np.uint8)
    mask[501, 333] = 1
    working = holes.mask_to_working(mask, area=area_of(1000, 1000))
    cells = holes.cover_cells(torch.from_numpy(working)[None, None], stride=8)

    assert working.sum() == 1
    assert cells.sum() == 64
    assert cells[0, 0, 32:40, 16:24].all()


# Masks


def test_mask_of_another_size_is_fitted_and_keeps_thin_holes() -> None:
    mask = np.zeros((500, 1000), dtype=np.uint8)
    mask[250] = 1
    fitted = holes.fit_mask(mask, height=50, width=100)

    assert fitted.shape == (50, 100)
    assert np.array_equal(np.flatnonzero(fitted.any(axis=1)), [25])
    assert holes.fit_mask(mask, height=333, width=667).shape == (333, 667)
    with pytest.raises(ValueError, match=r"mask of 1000x500 for a picture of 500x1000"):
        holes.fit_mask(mask, height=1000, width=500)


def test_mask_grows_by_so_many_pixels() -> None:
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[10, 1] = 1
    grown = holes.grow_mask(mask, radius_px=3)

    expected = np.zeros_like(mask)
    expected[7:14, 0:5] = 1
    assert np.array_equal(grown, expected)


@pytest.mark.parametrize("width_px", [1, 2, 5, 8])
def test_fill_fades_outside_the_hole_only(width_px: int) -> None:
    mask = np.zeros((40, 80), dtype=np.uint8)
    mask[:, :40] = 1
    mask[20, 60] = 1  # a thin hole, which a plain blur would leave half transparent
    weight = holes.fade_mask(mask, width_px=width_px)

    assert np.all(weight[mask == 1] == 255)
    assert np.all(np.diff(weight[0, :60].astype(int)) <= 0)
    assert np.all(weight[0, 40 : 40 + width_px] > 0)
    assert np.all(weight[0, 40 + width_px :] == 0)


# Pixels


def test_hole_is_filled_from_known_pixels_alone(image: np.ndarray, mask: np.ndarray) -> None:
    filled = holes.fill_hole(image, mask=mask)
    other = holes.fill_hole(np.where(mask[..., None] == 1, 255 - image, image), mask=mask)

    assert np.array_equal(filled[mask == 0], image[mask == 0])
    assert np.array_equal(filled, other)


def test_hole_continues_its_surroundings() -> None:
    image = np.zeros((60, 100, 3), dtype=np.uint8)
    image[:, 50:] = 200
    mask = np.zeros((60, 100), dtype=np.uint8)
    mask[20:40, 10:90] = 1
    row = holes.fill_hole(image, mask=mask)[30, :, 0].astype(int)

    assert row[:30].max() <= 10
    assert row[70:].min() >= 190
    assert np.all(holes.fill_hole(image, mask=np.ones_like(mask)) == 128)


def test_a_fill_meets_the_edge_and_stays_itself_further_in() -> None:
    """A fill of the right picture, but darker all over: the error is gone where it would show."""
    image = np.full((32, 32, 3), 200, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 8:] = 1  # to the picture's border, where there is no edge
    fill = np.full_like(image, 120)
    met = holes.meet_edge(fill, image=image, mask=mask, width_px=4)
    assert (met[:, 8:] == met[:1, 8:]).all()
    assert met[0, 8:, 0].tolist() == [200, 180, 160, 140, *[120] * 20]
    changed = np.where(mask[..., None] == 1, np.uint8(7), image)
    assert np.array_equal(met, holes.meet_edge(fill, image=changed, mask=mask, width_px=4))


def test_a_fill_that_is_right_outside_the_hole_changes_right_behind_its_edge_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[5:20, 8:30] = 1
    fill = np.where(mask[..., None] == 1, np.uint8(9), image)
    met = holes.meet_edge(fill, image=image, mask=mask, width_px=8)
    assert np.array_equal(met[7:18, 10:28], fill[7:18, 10:28]), "two pixels: a quarter of 8"
    assert np.array_equal(met[mask == 0], image[mask == 0])
    assert (met != fill)[mask == 1].any()
    nothing_known = np.ones_like(mask)
    assert np.array_equal(holes.meet_edge(fill, image=image, mask=nothing_known, width_px=8), fill)


@pytest.mark.parametrize(
    ("width_px", "expected"),
    [(4, [150, 100, 100, 100]), (8, [150, 125, 100, 100]), (16, [150, 137, 125, 112, 100])],
)
def test_right_behind_the_edge_the_known_colours_count_as_much_as_the_drawing(
    width_px: int, expected: list[int]
) -> None:
    """The drawing steps from 200 to 100 exactly at the edge: a seam, or what was there."""
    image = np.full((32, 32, 3), 200, np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 8:] = 1
    fill = np.where(mask[..., None] == 1, np.uint8(100), image)
    met = holes.meet_edge(fill, image=image, mask=mask, width_px=width_px)
    assert met[16, 8 : 8 + len(expected), 0].tolist() == pytest.approx(expected, abs=1)


def test_blend_returns_exact_bits_at_both_ends(image: np.ndarray) -> None:
    fill = 255 - image
    weight = np.zeros(image.shape[:2], dtype=np.uint8)
    weight[30:] = 255
    weight[:, 50] = 51
    mixed = holes.blend(image, fill=fill, weight=weight)

    assert np.array_equal(mixed[weight == 0], image[weight == 0])
    assert np.array_equal(mixed[weight == 255], fill[weight == 255])
    assert np.array_equal(
        mixed[:, 50], np.rint(0.8 * image[:, 50] + 0.2 * fill[:, 50].astype(float))
    )


def test_a_picture_may_be_16_times_as_long_as_wide_and_no_more() -> None:
    holes.check_proportions(16, 256)
    holes.check_proportions(256, 16)
    for sides in ((1, 17), (17, 1)):
        with pytest.raises(ValueError, match="at most 16 times as long"):
            holes.check_proportions(*sides)
