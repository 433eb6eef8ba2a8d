from __future__ import annotations

import numpy as np
import pytest

from inpainting.metrics import MAX_PSNR
from inpainting.scoreboard import OF_MEAN, Score, format_table, score_samples, summarize


@pytest.fixture
def truth() -> np.ndarray:
    return np.random.default_rng(0).integers(20, 200, (32, 32, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    hole = np.zeros((32, 32), np.uint8)
    hole[8:20, 10:25] = 1
    return hole


def test_a_perfect_sample_scores_perfectly(truth: np.ndarray, mask: np.ndarray) -> None:
    values, num_changed = score_samples([truth], truth=truth, given=truth, mask=mask)

    assert values["psnr_hole"] == values[f"psnr_hole{OF_MEAN}"] == MAX_PSNR
    assert values["l1_hole"] == values["seam_error"] == 0
    assert num_changed == 0


def test_opposite_errors_cancel_in_the_mean_of_samples_alone(
    truth: np.ndarray, mask: np.ndarray
) -> None:
    hole = mask[..., None]
    samples = [truth + 10 * hole, truth - 10 * hole]
    values, _ = score_samples(samples, truth=truth, given=truth, mask=mask)

    assert values["psnr_hole"] == pytest.approx(20 * np.log10(255 / 10), abs=1e-4)
    assert values[f"psnr_hole{OF_MEAN}"] == MAX_PSNR


def test_a_changed_known_pixel_is_counted_in_each_sample(
    truth: np.ndarray, mask: np.ndarray
) -> None:
    touched = truth.copy()
    touched[0, 0, 1] += 1
    _, num_changed = score_samples([truth, touched, touched], truth=truth, given=truth, mask=mask)

    assert num_changed == 2


def make_scores(candidate: str, psnrs: list[float], *, first_id: int = 1) -> list[Score]:
    names = ("psnr_hole", "ssim_hole", "l1_hole", "seam_error")
    return [
        Score("thick", image_id, candidate,
              {name + suffix: psnr for name in names for suffix in ("", OF_MEAN)}, 0)
        for image_id, psnr in enumerate(psnrs, first_id)
    ]  # fmt: skip


def test_the_winner_is_who_is_better_picture_by_picture() -> None:
    ours, theirs = make_scores("ours", [30, 20, 25, 25]), make_scores("theirs", [20, 30, 20, 25])
    (first, second) = summarize([*ours, *theirs[::-1]])["thick"]

    assert (first.candidate, second.candidate) == ("ours", "theirs")
    assert (first.means["psnr_hole"], second.means["psnr_hole"]) == (25, 23.75)
    assert (first.wins["psnr_hole"], second.wins["psnr_hole"]) == (0.625, 0.375)
    assert (first.wins["l1_hole"], second.wins["l1_hole"]) == (0.375, 0.625)  # lower is better
    low, high = first.intervals["psnr_hole"]
    assert 20 <= low < 25 < high <= 30


def test_the_order_in_which_pictures_were_done_changes_nothing() -> None:
    scores = [*make_scores("ours", [30, 20, 25]), *make_scores("theirs", [20, 30, 20])]
    again = [scores[i] for i in (2, 0, 1, 5, 3, 4)]

    assert summarize(scores) == summarize(again)


def test_the_table_is_markdown_with_a_line_for_each_candidate() -> None:
    summaries = summarize([*make_scores("ours", [30, 20]), *make_scores("theirs", [20, 30])])
    header, rule, ours, theirs = format_table(summaries).splitlines()

    assert len({len(line) for line in (header, rule, ours, theirs)}) == 1
    assert header.count("|") == ours.count("|") == rule.count("|")
    assert "25.00 [20.00, 30.00]" in ours
    assert "50%" in theirs
