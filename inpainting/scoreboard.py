"""From the filled holes of many pictures to a table: scores, their means, intervals and winners.

Terms: a *candidate* is something that fills holes; it gives one or more *samples* of a picture.
Each metric is taken of single samples (their average) and of the mean of all samples: the first
says how far a result is from the truth, the second how well the candidate knows what is likely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from inpainting.metrics import (
    bootstrap_interval,
    l1_hole,
    mean_of_samples,
    num_changed_known,
    psnr_hole,
    seam_error,
    ssim_hole,
    win_shares,
)

METRICS = {
    "psnr_hole": psnr_hole,
    "ssim_hole": ssim_hole,
    "l1_hole": l1_hole,
    "seam_error": seam_error,
}
HIGHER_IS_BETTER = {"psnr_hole", "ssim_hole"}
OF_MEAN = "_of_mean"  # ends the name of a metric that is taken of the samples' mean
INTERVAL_SEED = 0
# What the printed table shows, in this order; results.json has everything.
COLUMNS = {
    "psnr_hole": ("PSNR", "{:.2f}"),
    f"psnr_hole{OF_MEAN}": ("PSNR of mean", "{:.2f}"),
    "ssim_hole": ("SSIM", "{:.3f}"),
    "l1_hole": ("L1", "{:.4f}"),
    "seam_error": ("seam error", "{:.4f}"),
}


@dataclass(frozen=True)
class Score:
    """How well one candidate filled one hole of one picture.

    Attributes:
        kind: the kind of hole.
        image_id: of the picture.
        candidate: who filled it.
        values: metric -> value, each of single samples and (`*_of_mean`) of their mean.
        num_changed_known: pixels outside the hole that differ from the input, in any sample.
    """

    kind: str
    image_id: int
    candidate: str
    values: dict[str, float]
    num_changed_known: int


@dataclass(frozen=True)
class Summary:
    """One candidate's scores over all pictures of one kind of hole.

    Attributes:
        candidate: who filled them.
        num_pictures: how many.
        means: metric -> mean.
        intervals: metric -> 95 % bootstrap interval of the mean.
        wins: metric -> share of the pictures where nobody was better; ties are split.
        num_changed_known: over all pictures.
    """

    candidate: str
    num_pictures: int
    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    wins: dict[str, float]
    num_changed_known: int


def score_samples(
    samples: Sequence[np.ndarray], *, truth: np.ndarray, given: np.ndarray, mask: np.ndarray
) -> tuple[dict[str, float], int]:
    """Take every metric of a candidate's samples.

    Args:
        samples: (H, W, 3) uint8 each.
        truth: (H, W, 3) uint8, the whole picture.
        given: (H, W, 3) uint8, what the candidate was given.
        mask: (H, W) uint8, 1 = hole.

    Returns:
        metric -> value, and the number of known pixels that changed.
    """
    mean = mean_of_samples(samples)
    values = {}
    for name, metric in METRICS.items():
        singles = [metric(sample, truth=truth, mask=mask) for sample in samples]
        values[name] = float(np.mean(singles))
        values[name + OF_MEAN] = metric(mean, truth=truth, mask=mask)
    return values, sum(num_changed_known(sample, image=given, mask=mask) for sample in samples)


def summarize(scores: Sequence[Score]) -> dict[str, list[Summary]]:
    """Bring the scores together: kind of hole -> its candidates, in the order they appear."""
    return {
        kind: _summarize_kind([score for score in scores if score.kind == kind])
        for kind in dict.fromkeys(score.kind for score in scores)
    }


def _summarize_kind(scores: Sequence[Score]) -> list[Summary]:
    by_candidate: dict[str, list[Score]] = {}
    for score in sorted(scores, key=lambda score: score.image_id):
        by_candidate.setdefault(score.candidate, []).append(score)
    names = list(scores[0].values)
    columns = {
        name: {
            candidate: np.array([score.values[name] for score in of_one])
            for candidate, of_one in by_candidate.items()
        }
        for name in names
    }
    wins = {
        name: win_shares(
            columns[name], higher_is_better=name.removesuffix(OF_MEAN) in HIGHER_IS_BETTER
        )
        for name in names
    }
    return [
        Summary(
            candidate=candidate,
            num_pictures=len(of_one),
            means={name: float(columns[name][candidate].mean()) for name in names},
            intervals={
                name: bootstrap_interval(columns[name][candidate], seed=INTERVAL_SEED)
                for name in names
            },
            wins={name: wins[name][candidate] for name in names},
            num_changed_known=sum(score.num_changed_known for score in of_one),
        )
        for candidate, of_one in by_candidate.items()
    ]


def format_table(summaries: Mapping[str, Sequence[Summary]]) -> str:
    """Write the summaries as one Markdown table: mean [95 % interval], and who wins by PSNR."""
    titles = ["hole", "pictures", "filled by", *(title for title, _ in COLUMNS.values())]
    rows = [[*titles, "wins", "known pixels changed"]]
    for kind, of_kind in summaries.items():
        for summary in of_kind:
            cells = [kind, str(summary.num_pictures), summary.candidate]
            for name, (_, style) in COLUMNS.items():
                low, high = summary.intervals[name]
                cells.append(f"{style} [{style}, {style}]".format(summary.means[name], low, high))
            cells += [f"{summary.wins['psnr_hole']:.0%}", str(summary.num_changed_known)]
            rows.append(cells)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
