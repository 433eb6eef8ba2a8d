"""Metrics of filled holes: answers that are known without them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from inpainting.metrics import (
    MAX_PSNR,
    bootstrap_interval,
    l1_hole,
    mean_of_samples,
    num_changed_known,
    psnr_hole,
    seam_error,
    ssim_hole,
    win_shares,
)

IN_HOLE = (psnr_hole, ssim_hole, l1_hole)
PERFECT = {psnr_hole: MAX_PSNR, ssim_hole: 1.0, l1_hole: 0.0, seam_error: 0.0}
TOLERANCE = {ssim_hole: 1e-3}  # float32; the others are exact


def picture(size: int = 64) -> np.ndarray:
    """Return noise and a flat half, with room to be shifted by 10 levels."""
    image = np.random.default_rng(0).integers(20, 230, (size, size, 3), dtype=np.uint8)
    image[: size // 2] = (40, 200, 120)
    return image


def middle_hole(size: int = 64) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 1
    return mask


def left_hole(size: int) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[:, : size // 2] = 1
    return mask


@pytest.mark.parametrize("metric", PERFECT)
def test_a_perfect_result_has_a_perfect_score(metric) -> None:
    truth = picture()
    score = metric(truth.copy(), truth=truth, mask=middle_hole())
    assert score == pytest.approx(PERFECT[metric], abs=TOLERANCE.get(metric, 1e-9))


def test_the_best_psnr_is_that_of_rounding_to_grey_levels() -> None:
    rng = np.random.default_rng(0)
    exact = rng.uniform(0, 255, 10**6)
    mse = np.mean((exact - np.rint(exact)) ** 2)
    assert pytest.approx(10 * math.log10(255**2 / mse), abs=0.01) == MAX_PSNR
    assert round(MAX_PSNR, 2) == 58.92


def test_a_shift_of_ten_levels_has_its_known_answers() -> None:
    truth, mask = picture(), middle_hole()
    result = truth + mask[..., None] * np.uint8(10)
    assert psnr_hole(result, truth=truth, mask=mask) == pytest.approx(28.1308, abs=1e-4)
    assert l1_hole(result, truth=truth, mask=mask) == pytest.approx(10 / 255)
    assert 0.3 < ssim_hole(result, truth=truth, mask=mask) < 0.998


def test_differences_below_zero_do_not_wrap_around() -> None:
    truth, mask = picture(), middle_hole()
    result = truth - mask[..., None] * np.uint8(10)
    assert psnr_hole(result, truth=truth, mask=mask) == pytest.approx(28.1308, abs=1e-4)
    assert l1_hole(result, truth=truth, mask=mask) == pytest.approx(10 / 255)


def test_black_for_white_is_as_wrong_as_can_be() -> None:
    truth = np.full((64, 64, 3), 255, np.uint8)
    mask = np.ones((64, 64), np.uint8)
    mask[0, 0] = 0
    result = np.zeros_like(truth)
    assert psnr_hole(result, truth=truth, mask=mask) == pytest.approx(0, abs=1e-5)
    assert l1_hole(result, truth=truth, mask=mask) == 1
    assert ssim_hole(result, truth=truth, mask=mask) == pytest.approx(1e-4, abs=1e-4)


def test_the_similarity_of_two_flat_colours_is_that_of_the_formula() -> None:
    truth = np.full((64, 64, 3), 200, np.uint8)
    mask = np.ones((64, 64), np.uint8)
    mask[0, 0] = 0
    c1 = (0.01 * 255) ** 2
    expected = (2 * 200 * 100 + c1) / (200**2 + 100**2 + c1)
    score = ssim_hole(np.full_like(truth, 100), truth=truth, mask=mask)
    assert score == pytest.approx(expected, abs=5e-3)  # the corner's windows see a known pixel


def test_similarity_notices_lost_texture_where_the_mean_is_right() -> None:
    truth, mask = picture(), np.zeros((64, 64), np.uint8)
    mask[40:60, 20:40] = 1
    result = truth.copy()
    result[mask == 1] = truth[mask == 1].mean(axis=0).astype(np.uint8)
    assert ssim_hole(result, truth=truth, mask=mask) < 0.5


def test_a_bright_flat_area_is_like_itself_to_a_thousandth() -> None:
    truth = np.full((64, 64, 3), 255, np.uint8)
    assert ssim_hole(truth, truth=truth, mask=middle_hole()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("metric", IN_HOLE)
def test_an_error_outside_the_hole_does_not_count(metric) -> None:
    truth, mask = picture(), middle_hole()
    result = np.where(mask[..., None] == 1, truth, 255 - truth)
    assert metric(result, truth=truth, mask=mask) == pytest.approx(
        PERFECT[metric], abs=TOLERANCE.get(metric, 1e-9)
    )


@pytest.mark.parametrize("metric", IN_HOLE)
def test_the_same_error_weighs_more_in_a_smaller_hole(metric) -> None:
    truth, mask = picture(), middle_hole()
    result = truth.copy()
    result[30:34, 30:34] = 255 - truth[30:34, 30:34]
    small = np.zeros_like(mask)
    small[28:36, 28:36] = 1
    better, worse = (metric(result, truth=truth, mask=hole) for hole in (mask, small))
    assert (better < worse) if metric is l1_hole else (better > worse), (better, worse)


@pytest.mark.parametrize(("size", "width"), [(64, 1), (512, 3)])
def test_a_visible_edge_has_its_known_seam(size: int, width: int) -> None:
    truth, mask = picture(size), left_hole(size)
    result = truth + mask[..., None] * np.uint8(10)
    # One of the 2 w - 1 steps across the band jumps; none of the steps along its 2 w columns does.
    num_steps = (2 * width - 1) * size + 2 * width * (size - 1)
    expected = 10 / 255 * size / num_steps
    assert seam_error(result, truth=truth, mask=mask) == pytest.approx(expected)
    darker = truth - mask[..., None] * np.uint8(10)
    assert seam_error(darker, truth=truth, mask=mask) == pytest.approx(expected)


def test_an_error_far_from_the_edge_is_no_seam() -> None:
    truth, mask = picture(), left_hole(64)
    result = truth.copy()
    result[:, :20] = 255 - truth[:, :20]  # up to the picture's borders
    result[:, 50:] = 255 - truth[:, 50:]
    assert seam_error(result, truth=truth, mask=mask) == 0


def test_smoothing_the_truths_own_edge_away_is_a_seam() -> None:
    truth, mask = np.zeros((64, 64, 3), np.uint8), left_hole(64)
    truth[:, 32:] = 100
    result = np.full_like(truth, 100)
    assert seam_error(result, truth=truth, mask=mask) > 0.1


def test_changed_known_pixels_are_counted_once_each() -> None:
    image, mask = picture(), middle_hole()
    result = image + mask[..., None] * np.uint8(7)
    assert num_changed_known(result, image=image, mask=mask) == 0
    result[0, 0] += 1  # three channels
    result[63, 5, 1] -= 1
    assert num_changed_known(result, image=image, mask=mask) == 2


def test_a_mean_of_samples_rounds_halves_to_even() -> None:
    samples = [np.array([0, 1, 250, 3, 10], np.uint8), np.array([1, 2, 255, 3, 20], np.uint8)]
    mean = mean_of_samples(samples)
    assert mean.dtype == np.uint8
    assert mean.tolist() == [0, 2, 252, 3, 15]
    assert mean_of_samples([*samples, np.array([1, 2, 255, 9, 0], np.uint8)]).tolist() == [
        *(1, 2, 253, 5, 10),
    ]
    assert mean_of_samples(samples[:1]).tolist() == samples[0].tolist()


def test_an_interval_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval(values, seed=0)
    error = values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    inner = bootstrap_interval(values, seed=0, level=0.5)
    assert low < inner[0] < values.mean() < inner[1] < high


def test_an_interval_depends_on_its_seed_alone() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)


def test_wins_are_shared_where_methods_tie() -> None:
    values = {
        "ours": np.array([3.0, 1.0, 2.0, 5.0]),
        "telea": np.array([1.0, 2.0, 2.0, 5.0]),
        "mean": np.array([0.0, 0.0, 0.0, 5.0]),
    }
    shares = win_shares(values, higher_is_better=True)
    assert list(shares) == list(values)
    third = 1 / 3
    assert shares == pytest.approx(
        {"ours": (1.5 + third) / 4, "telea": (1.5 + third) / 4, "mean": third / 4}
    )
    lowest = win_shares(values, higher_is_better=False)
    assert lowest == pytest.approx({"ours": third / 4, "telea": third / 4, "mean": (3 + third) / 4})
