"""AdamW in its kinds; rates and place in the schedule of one that was resumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def build_adamw(
    parameters: Sequence[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    use_8bit_adam: bool,
    is_offloaded: bool,
    is_fused: bool,
) -> torch.optim.Optimizer:
    """Build the AdamW that a run asks for.

    Source: Loshchilov and Hutter 2019; betas and eps are those of diffusers' example.

    Args:
        parameters: what is trained.
        learning_rate: peak learning rate.
        weight_decay: decoupled weight decay.
        use_8bit_adam: keep the moments in 8 bits (bitsandbytes).
        is_offloaded: DeepSpeed keeps parameters and moments in the host's memory.
        is_fused: one kernel instead of hundreds, where the device has it.
    """
    settings: dict[str, Any] = {
        "lr": learning_rate, "betas": (0.9, 0.999), "weight_decay": weight_decay, "eps": 1e-8
    }  # fmt: skip
    assert not (is_offloaded and use_8bit_adam)
    if is_offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, **settings)
    if use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]  # optional

        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings, fused=is_fused)


def moved_step(
    step: int, *, steps_per_epoch: int, earlier_steps_per_epoch: int, num_warmup_steps: int
) -> int:
    """Return a schedule's step where an epoch has another number of them than it had.

    As many epochs are done as were. The warm-up is counted in steps, and not repeated.

    Args:
        step: of the schedule so far.
        steps_per_epoch: from now on.
        earlier_steps_per_epoch: so far.
        num_warmup_steps: optimizer steps of linear warm-up.
    """
    if step <= num_warmup_steps:
        return step
    return max(round(step * steps_per_epoch / earlier_steps_per_epoch), num_warmup_steps)


def set_rates(
    optimizer: torch.optim.Optimizer,
    *,
    schedule: LambdaLR,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Give an optimizer and its schedule, both as a checkpoint has them, a run's own rates.

    Where they are the checkpoint's, every group gets the same bits again.

    Args:
        optimizer: changed.
        schedule: changed; it stays at its step.
        learning_rate: peak learning rate.
        weight_decay: decoupled weight decay.
    """
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule.base_lrs = [learning_rate] * len(factors)
    schedule._last_lr = [learning_rate * factor for factor in factors]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["initial_lr"] = learning_rate
        group["lr"] = rate
        group["weight_decay"] = weight_decay
