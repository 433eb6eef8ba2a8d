"""What a validation measures, by numbers that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from inpainting.validation import losses_by_place, summarize_losses

ALWAYS = {"val/loss", "val/loss_base", "val/control_gain", "val/loss_hole", "val/loss_known"}


def pictures(**values: list[float]) -> dict[str, torch.Tensor]:
    """Three pictures, unless told otherwise."""
    plain = {
        "image_id": [7, 3, 5], "timestep": [0, 0, 0], "loss": [1.0, 2.0, 6.0],
        "loss_base": [2.0, 4.0, 6.0], "loss_hole": [1.0, 2.0, 6.0], "loss_known": [1.0, 2.0, 6.0],
        "num_hole_cells": [2.0, 2.0, 2.0], "num_known_cells": [2.0, 2.0, 2.0],
    }  # fmt: skip
    return {name: torch.tensor(column) for name, column in (plain | values).items()}


def summary(**values: list[float]) -> dict[str, float]:
    return summarize_losses(pictures(**values), num_train_timesteps=1000)


# ---- by place


def test_a_cell_that_the_hole_touches_lies_in_the_hole() -> None:
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    mask[0, 0, 1, 1] = 1  # one pixel of the first cell
    mask[1, 0, :, 1:] = 1  # whole cells and halves of them
    loss = torch.tensor([[[8.0, 1.0], [2.0, 3.0]], [[1.0, 3.0], [5.0, 7.0]]])
    found = losses_by_place(loss, mask=mask)
    assert found["loss"].tolist() == [3.5, 4.0]
    assert found["loss_hole"].tolist() == [8.0, 4.0]
    assert found["loss_known"][0] == 2.0
    assert found["loss_known"].isnan().tolist() == [False, True], "no cell is left to be known"
    assert found["num_hole_cells"].tolist() == [1, 4]
    assert found["num_known_cells"].tolist() == [3, 0]


@pytest.mark.parametrize("stride", [4, 8])
def test_the_cells_follow_the_strides_grid(stride: int) -> None:
    mask = torch.zeros(1, 1, 4 * stride, 4 * stride, dtype=torch.uint8)
    mask[..., stride : 2 * stride, 2 * stride : 3 * stride] = 1
    loss = torch.zeros(1, 4, 4)
    loss[0, 1, 2] = 5.0
    found = losses_by_place(loss, mask=mask)
    assert (found["loss_hole"].item(), found["loss_known"].item()) == (5.0, 0.0)


# ---- over pictures


def test_a_picture_counts_once_at_its_first_place() -> None:
    repeated = summary(
        image_id=[7, 3, 5, 7, 7], loss=[1.0, 2.0, 6.0, 9.0, 9.0], loss_base=[2.0, 4.0, 6.0, 9, 9],
        timestep=[0, 0, 0, 999, 999], loss_hole=[1.0, 2.0, 6.0, 9.0, 9.0],
        loss_known=[1.0, 2.0, 6.0, 9.0, 9.0], num_hole_cells=[2.0] * 5,
        num_known_cells=[2.0] * 5,
    )  # fmt: skip
    assert repeated == summary()
    assert repeated["val/loss"] == 3.0


def test_the_gain_is_the_share_of_the_base_loss_that_is_taken_away() -> None:
    found = summary()
    assert (found["val/loss"], found["val/loss_base"]) == (3.0, 4.0)
    assert found["val/control_gain"] == 0.25
    assert summary(loss_base=[0.5, 0.5, 0.5])["val/control_gain"] == -5.0
    thirds = [1 / 3, 2 / 7, 0.1]
    assert summary(loss=thirds, loss_base=thirds)["val/control_gain"] == 0.0


def test_the_bands_are_quarters_of_the_schedule_and_empty_ones_are_left_out() -> None:
    found = summary(timestep=[249, 250, 999])
    bands = {name: value for name, value in found.items() if name not in ALWAYS}
    assert bands == {
        "val/loss_t000_250": 1.0, "val/loss_t250_500": 2.0, "val/loss_t750_1000": 6.0
    }  # fmt: skip
    found = summary(timestep=[0, 749, 500])
    bands = {name: value for name, value in found.items() if name not in ALWAYS}
    assert bands == {"val/loss_t000_250": 1.0, "val/loss_t500_750": 4.0}


def test_another_schedule_has_other_bands() -> None:
    found = summarize_losses(pictures(timestep=[0, 25, 99]), num_train_timesteps=100)
    bands = {name: value for name, value in found.items() if name not in ALWAYS}
    assert bands == {
        "val/loss_t000_025": 1.0, "val/loss_t025_050": 2.0, "val/loss_t075_100": 6.0
    }  # fmt: skip


def test_a_picture_without_a_place_says_nothing_about_it() -> None:
    nan = math.nan
    found = summary(
        loss_known=[nan, 2.0, 6.0], num_known_cells=[0.0, 2.0, 4.0],
        loss_hole=[1.0, 2.0, nan], num_hole_cells=[4.0, 2.0, 0.0],
    )  # fmt: skip
    assert (found["val/loss_known"], found["val/loss_hole"]) == (4.0, 1.5)
    found = summary(loss_known=[nan, nan, nan], num_known_cells=[0.0, 0.0, 0.0])
    assert "val/loss_known" not in found


def test_a_loss_that_diverged_is_shown_not_left_out() -> None:
    nan = [math.nan] * 3
    found = summary(loss=nan, loss_hole=nan, loss_known=nan)
    assert {name for name, value in found.items() if math.isnan(value)} == {
        "val/loss", "val/control_gain", "val/loss_hole", "val/loss_known", "val/loss_t000_250"
    }  # fmt: skip
