"""What a validation's loss consists of: by place and timestep, and the ControlNet's part.

Pure functions of arrays. Terms: a *cell* is one latent pixel, and lies in the hole if the hole
touches it; a *band* is a part of the noise schedule; the *base loss* is that of the frozen base
alone, without the ControlNet's residuals.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from torch import Tensor
from torch.nn import functional as F

NUM_BANDS = 4


def losses_by_place(loss: Tensor, *, mask: Tensor) -> dict[str, Tensor]:
    """Average each picture's loss over all of its cells, over the hole and over the rest.

    Args:
        loss: (B, h, w) float32, each cell's.
        mask: (B, 1, H, W) uint8, 1 = hole.

    Returns:
        loss, loss_hole, loss_known, and how many cells the last two average: num_hole_cells and
        num_known_cells; (B,) float32 each. NaN where there are none, or where training diverged.
    """
    stride = mask.shape[-1] // loss.shape[-1]
    hole = F.max_pool2d(mask.float(), stride)[:, 0]
    known = 1 - hole
    num_hole_cells, num_known_cells = hole.sum(dim=(1, 2)), known.sum(dim=(1, 2))
    return {
        "loss": loss.mean(dim=(1, 2)),
        "loss_hole": (loss * hole).sum(dim=(1, 2)) / num_hole_cells,
        "loss_known": (loss * known).sum(dim=(1, 2)) / num_known_cells,
        "num_hole_cells": num_hole_cells,
        "num_known_cells": num_known_cells,
    }


def summarize_losses(
    pictures: Mapping[str, Tensor], *, num_train_timesteps: int
) -> dict[str, float]:
    """Average over pictures, each counted once, in the order of their ids.

    Ranks are padded with repeated pictures so that all of them run equally many batches.

    Args:
        pictures: what losses_by_place returns, loss_base, timestep and image_id, (N,) on the CPU.
        num_train_timesteps: length of the noise schedule.

    Returns:
        The means by metric; a place or band that no picture has is left out. val/control_gain
        is the share of the base loss that the ControlNet takes away, 0 if it does nothing.
    """
    _, first = np.unique(pictures["image_id"].numpy(), return_index=True)
    once = {name: values[first].double() for name, values in pictures.items()}
    loss, loss_base = once["loss"].mean(), once["loss_base"].mean()
    parts = {
        "val/loss_hole": once["loss_hole"][once["num_hole_cells"] > 0],
        "val/loss_known": once["loss_known"][once["num_known_cells"] > 0],
    }
    edges = [band * num_train_timesteps // NUM_BANDS for band in range(NUM_BANDS + 1)]
    for start, end in pairwise(edges):
        is_inside = (start <= once["timestep"]) & (once["timestep"] < end)
        parts[f"val/loss_t{start:03d}_{end:03d}"] = once["loss"][is_inside]
    return {
        "val/loss": float(loss),
        "val/loss_base": float(loss_base),
        "val/control_gain": float(1 - loss / loss_base),
        **{name: float(losses.mean()) for name, losses in parts.items() if len(losses)},
    }
