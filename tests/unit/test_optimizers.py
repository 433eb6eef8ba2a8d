"""What a resume does with a schedule; AdamW itself is tested with the module that it trains."""

from __future__ import annotations

import pytest

from inpainting.optimizers import moved_step


@pytest.mark.parametrize(
    ("step", "now", "expected"),
    [
        (2000, 1000, 2000),  # nothing changed
        (2000, 500, 1000),
        (2000, 2000, 4000),
        (100, 125, 100),  # still warming up
        (100, 8000, 100),
        (300, 100, 200),  # not once more
    ],
)
def test_a_schedule_keeps_its_place_in_the_epochs(step, now, expected) -> None:
    moved = moved_step(
        step, steps_per_epoch=now, earlier_steps_per_epoch=1000, num_warmup_steps=200
    )
    assert moved == expected
