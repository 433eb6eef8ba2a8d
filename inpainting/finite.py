"""Optimizer steps whose loss or gradient is NaN or infinite are left out, decided on the device.

Parameters, their average, Adam's state and its count of steps stay as they were, on all ranks
alike. Nothing waits for the device until `check` is asked, at log points: a few such steps in a row
end the run there. (A GradScaler waits once a step.)

A loss that isn't finite is made to spoil every gradient of its step. So the norm of all gradients,
which is computed for clipping and is the same on all ranks, tells everything.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

NUM_IN_A_ROW = 5
# fp16's loss scale starts at 2**16 and is halved at each overflow: not before it is far below 1 is
# something wrong.
NUM_SCALE_HALVINGS = 24
NUM_NAMED = 8


class NotFiniteError(Exception):
    """Too many steps in a row had to be left out; says how many, and with which pictures."""


class FiniteSteps:
    """Leaves steps out, and knows how many and of which samples.

    Args:
        has_loss_scaler: a GradScaler scales the loss (fp16). It leaves steps out by itself.

    Attributes:
        is_bad: () bool on the device, whether the last step was left out.
    """

    def __init__(self, *, has_loss_scaler: bool) -> None:
        self.has_loss_scaler = has_loss_scaler
        self.is_bad = torch.tensor(False)
        self._counts = torch.zeros(2, dtype=torch.int64)  # left out: in a row, since the last check
        self._step: list[tuple[Tensor, Tensor]] = []
        self._steps: deque[list[tuple[Tensor, Tensor]]] = deque(maxlen=NUM_IN_A_ROW)

    def to(self, device: torch.device) -> None:
        """Count on the device."""
        self.is_bad = self.is_bad.to(device)
        self._counts = self._counts.to(device)

    def watch(self, losses: Tensor, *, image_ids: Tensor) -> Tensor:
        """Return the mean loss of one micro-batch, whose gradient is NaN where it isn't finite.

        Args:
            losses: (B, ...) float32.
            image_ids: (B,) int64.

        Returns:
            () float32; the mean itself, bit for bit.
        """
        loss = losses.mean()
        is_finite = loss.detach().isfinite()
        self._step.append(
            (image_ids, losses.detach().isfinite().reshape(len(losses), -1).all(dim=1))
        )
        return loss * torch.where(is_finite, 1.0, torch.nan)

    def judge(self, grad_norm: Tensor) -> Tensor:
        """Count a step; returns () float32, 1 where it must be left out.

        Args:
            grad_norm: () the norm of all gradients, over all ranks.
        """
        self.is_bad = ~grad_norm.isfinite()
        in_a_row = torch.where(self.is_bad, self._counts[0] + 1, 0)
        self._counts = torch.stack([in_a_row, self._counts[1] + self.is_bad])
        self._steps.append(self._step)
        self._step = []
        return self.is_bad.float()

    def leave_out(self, optimizer: torch.optim.Optimizer, *, grad_norm: Tensor) -> None:
        """Count a step, and keep the optimizer from it where its gradients aren't finite.

        Args:
            optimizer: is about to step.
            grad_norm: as in `judge`.
        """
        found_inf = self.judge(grad_norm)
        if self.has_loss_scaler:
            return
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # a GradScaler's way
        elif found_inf.item():  # no fused AdamW takes the verdict on the device
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def check(self) -> int:
        """Return how many steps were left out since the last check. Every rank must ask.

        Raises:
            NotFiniteError: the last NUM_IN_A_ROW were (with a loss scaler: more).
        """
        in_a_row, num_left_out = self._counts.tolist()
        self._counts = torch.stack([self._counts[0], self._counts[1] * 0])
        allowed = NUM_IN_A_ROW + NUM_SCALE_HALVINGS * self.has_loss_scaler
        if in_a_row >= allowed:
            raise NotFiniteError(
                f"the loss or a gradient was NaN or infinite in the last {in_a_row} steps, which "
                f"were left out; {self._name_pictures()}"
            )
        return num_left_out

    def _name_pictures(self) -> str:
        """Name the pictures whose own loss wasn't finite, or all of the last steps'."""
        parts = [part for step in self._steps for part in step]
        ids = torch.cat([ids for ids, _ in parts]).tolist()
        is_finite = torch.cat([finite for _, finite in parts]).tolist()
        found = [(ids, is_finite)]
        if dist.is_initialized():
            found = [found[0]] * dist.get_world_size()
            dist.all_gather_object(found, (ids, is_finite))
        rows = [row for ids, is_finite in found for row in zip(ids, is_finite, strict=True)]
        spoiled = [image_id for image_id, finite in rows if not finite]
        what = "pictures with such a loss" if spoiled else "every loss was finite, pictures"
        named = list(dict.fromkeys(spoiled or [image_id for image_id, _ in rows]))
        rest = f" and {len(named) - NUM_NAMED} more" if len(named) > NUM_NAMED else ""
        return f"{what}: {', '.join(map(str, named[:NUM_NAMED]))}{rest}"
