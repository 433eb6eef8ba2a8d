"""Holes drawn for training: their areas, their mixture, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from inpainting.mask_flags import MASK_TYPES, check_area_range, parse_mask_types
from inpainting.masks import dilate, draw_mask, paint_stroke

DRAWN_TYPES = [name for name in MASK_TYPES if name != "object"]
RANGES = [(0.1, 0.3), (0.02, 0.05), (0.4, 0.6), (0.2, 0.2003), (0.001, 0.002), (0.9, 0.99)]


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def box_mask(size: int, top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


@pytest.mark.parametrize("area_range", RANGES, ids=str)
@pytest.mark.parametrize("mask_type", DRAWN_TYPES)
def test_the_share_lies_in_the_range_at_every_size(
    mask_type: str, area_range: tuple[float, float]
) -> None:
    for size, num_seeds in ((64, 60), (96, 40), (128, 40), (320, 20), (512, 20), (768, 10)):
        check_area_range(*area_range)
        for seed in range(num_seeds):
            mask = draw_mask(
                rng(seed), size=size, mask_types={mask_type: 1.0}, area_range=area_range
            )
            assert mask.shape == (size, size)
            assert mask.dtype == np.uint8
            assert mask.max() == 1
            share = mask.mean()
            assert area_range[0] <= share <= area_range[1], (size, seed, share)


@pytest.mark.parametrize("mask_type", DRAWN_TYPES)
def test_a_range_of_one_pixel_is_met(mask_type: str) -> None:
    for seed in range(30):
        mask = draw_mask(
            rng(seed), size=64, mask_types={mask_type: 1.0}, area_range=(1000 / 4096, 1000.9 / 4096)
        )
        assert mask.sum() == 1000


@pytest.mark.parametrize("mask_type", DRAWN_TYPES)
def test_shares_use_the_whole_range(mask_type: str) -> None:
    shares = [
        draw_mask(rng(seed), size=128, mask_types={mask_type: 1.0}, area_range=(0.1, 0.3)).mean()
        for seed in range(200)
    ]
    assert min(shares) < 0.13
    assert max(shares) > 0.27
    assert 0.16 < np.mean(shares) < 0.24


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_a_mask_depends_on_its_generator_alone(mask_type: str) -> None:
    objects = [box_mask(96, 10 * i, 5 * i, 30, 40) for i in range(4)]

    def draw(seed: int) -> np.ndarray:
        return draw_mask(
            rng(seed),
            size=96,
            mask_types={mask_type: 1.0},
            area_range=(0.1, 0.3),
            object_masks=objects,
        )

    for seed in range(10):
        np.testing.assert_array_equal(draw(seed), draw(seed))
    assert any(not np.array_equal(draw(0), draw(seed)) for seed in range(1, 10))


def test_a_mask_scales_with_the_picture() -> None:
    overlaps = []
    for seed in range(30):
        large, small = (
            draw_mask(rng(seed), size=size, mask_types={"irregular": 1.0}, area_range=(0.1, 0.3))
            for size in (512, 256)
        )
        overlaps.append((large[::2, ::2] & small).sum() / (large[::2, ::2] | small).sum())
    assert np.median(overlaps) > 0.9, overlaps


def test_borders_leave_one_rectangle() -> None:
    for seed in range(50):
        mask = draw_mask(rng(seed), size=64, mask_types={"outpaint": 1.0}, area_range=(0.1, 0.3))
        rows, columns = np.nonzero(mask == 0)
        kept = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert not kept.any()


def test_types_come_in_the_proportions_of_the_mixture() -> None:
    def is_border(mask: np.ndarray) -> bool:
        return any(line.all() for line in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))

    mixture = {"rectangle": 0.7, "outpaint": 0.3}
    drawn = [
        is_border(draw_mask(rng(seed), size=64, mask_types=mixture, area_range=(0.1, 0.3)))
        for seed in range(600)
    ]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.06)


def test_an_object_mask_covers_its_object_with_a_little_more() -> None:
    target = box_mask(128, 40, 30, 50, 40)
    for seed in range(20):
        mask = draw_mask(
            rng(seed),
            size=128,
            mask_types={"object": 1.0},
            area_range=(0.1, 0.3),
            object_masks=[target],
        )
        assert not np.any(target > mask)
        assert target.sum() <= mask.sum() <= 1.4 * target.sum()


def test_small_objects_are_joined_and_large_ones_left_out() -> None:
    small = [box_mask(128, 30 * i, 10, 28, 20) for i in range(4)]  # 3.4 % each
    large = box_mask(128, 0, 40, 128, 80)  # 62 %
    for seed in range(20):
        mask = draw_mask(
            rng(seed),
            size=128,
            mask_types={"object": 1.0},
            area_range=(0.1, 0.3),
            object_masks=[large, *small],
        )
        assert 0.1 <= mask.mean() <= 0.3
        assert not mask[:, 40:].any()


def test_objects_are_decoded_only_when_needed() -> None:
    calls = []

    def decode(index: int) -> np.ndarray:
        calls.append(index)
        return box_mask(64, 10, 10, 28, 28)

    for seed in range(10):
        calls.clear()
        draw_mask(
            rng(seed),
            size=64,
            mask_types={"object": 1.0},
            area_range=(0.1, 0.4),
            object_masks=[lambda index=index: decode(index) for index in range(5)],
        )
        assert len(calls) == 1


def test_object_masks_are_not_written_to() -> None:
    target = box_mask(64, 10, 10, 28, 28)
    target.flags.writeable = False
    draw_mask(
        rng(0),
        size=64,
        mask_types={"object": 1.0},
        area_range=(0.1, 0.4),
        object_masks=[target],
    )


@pytest.mark.parametrize(
    "objects",
    [[], [np.zeros((64, 64), np.uint8)], [np.ones((64, 64), np.uint8)]],
    ids=["none", "empty", "full"],
)
def test_without_a_suitable_object_another_type_is_drawn(objects: list[np.ndarray]) -> None:
    for seed in range(20):
        mask = draw_mask(
            rng(seed),
            size=64,
            mask_types={"object": 0.9, "outpaint": 0.1},
            area_range=(0.1, 0.3),
            object_masks=objects,
        )
        assert 0.1 <= mask.mean() <= 0.3
        assert any(line.all() for line in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    alone = draw_mask(
        rng(0),
        size=64,
        mask_types={"object": 1.0},
        area_range=(0.1, 0.3),
        object_masks=objects,
    )
    assert 0.1 <= alone.mean() <= 0.3


@pytest.mark.parametrize("width", [0.1, 1.0, 1.4, 7.0])
def test_a_stroke_has_no_gaps_and_at_least_one_pixel_of_width(width: float) -> None:
    canvas = Image.new("L", (64, 64))
    points = np.array([[5.2, 3.7], [20.9, 30.1], [9.5, 60.3]])
    paint_stroke(ImageDraw.Draw(canvas), points, width=width)
    widths = np.asarray(canvas)[4:60].sum(axis=1)
    assert widths.min() >= max(round(width), 1), widths


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 9, 40])
def test_dilate_equals_a_disc_tested_pixel_by_pixel(radius: int) -> None:
    mask = (rng(radius).random((32, 45)) > 0.995).astype(np.uint8)
    mask[0, 44] = mask[31, 0] = 1
    before = mask.copy()
    y, x = np.mgrid[:32, :45]
    rows, columns = np.nonzero(mask)
    squared = (y[..., None] - rows) ** 2 + (x[..., None] - columns) ** 2
    expected = (squared <= radius**2).any(axis=-1)
    np.testing.assert_array_equal(dilate(mask, radius=radius), expected)
    np.testing.assert_array_equal(mask, before)


def test_a_range_without_a_whole_pixel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"whole number of pixels at 64 px, got 0.2 0.20001"):
        draw_mask(rng(0), size=64, mask_types={"irregular": 1.0}, area_range=(0.2, 0.20001))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("irregular", {"irregular": 1.0}),
        ("irregular,rectangle", {"irregular": 0.5, "rectangle": 0.5}),
        ("object=3, irregular = 1", {"object": 0.75, "irregular": 0.25}),
        ("outpaint=1e308,object=1e308", {"outpaint": 0.5, "object": 0.5}),
    ],
)
def test_mixtures_are_parsed(text: str, expected: dict[str, float]) -> None:
    assert parse_mask_types(text) == pytest.approx(expected)
    assert list(parse_mask_types(text)) == list(expected)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "irregular, rectangle, object, outpaint .* got ''"),
        ("blob=1", "got 'blob'"),
        ("irregular,", "got ''"),
        ("Irregular", "got 'Irregular'"),
        ("object,object", "got object twice"),
        ("object=", "got weight '' for object"),
        ("object=half", "got weight 'half' for object"),
        ("object=0", "got weight '0' for object"),
        ("object=-1,irregular=2", "got weight '-1' for object"),
        ("object=nan", "got weight 'nan' for object"),
        ("object=inf", "got weight 'inf' for object"),
        ("object=0.5,irregular", "where only some have one"),
    ],
)
def test_bad_mixtures_are_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        parse_mask_types(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lo", "hi", "match"),
    [
        (0.0, 0.3, "0 < low < high < 1, got 0.0 0.3"),
        (0.1, 1.0, "0 < low < high < 1"),
        (0.3, 0.1, "0 < low < high < 1"),
        (0.2, 0.2, "0 < low < high < 1"),
        (float("nan"), 0.3, "0 < low < high < 1"),
        (10, 30, "0 < low < high < 1, got 10 30"),
        (0.2, 0.2001, r"at least 0.000244 wide \(one pixel at 64 px\), got 0.2 0.2001"),
    ],
)
def test_impossible_ranges_are_refused(lo: float, hi: float, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        check_area_range(lo, hi)
    assert "\n" not in str(caught.value)


def test_a_range_may_be_narrower_in_a_larger_picture() -> None:
    check_area_range(0.2, 0.2001, size=512)
