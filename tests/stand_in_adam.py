"""A stand-in for bitsandbytes' 8-bit AdamW, where bitsandbytes isn't installed.

It has what matters to a trainer: no fused kernel that could take a verdict on the device, a state
of its own names and dtypes, and parameters without a gradient are passed over.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments are rounded to 8 bits, each tensor with one scale."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in ("1", "2"):
                state[f"state{name}"] = torch.zeros_like(parameter, dtype=torch.int8)
                state[f"absmax{name}"] = torch.zeros(())
        state["step"] += 1
        moments = []
        powers = (parameter.grad, parameter.grad**2)
        for name, beta, power in zip(("1", "2"), group["betas"], powers, strict=True):
            moment = state[f"state{name}"].float() / 127 * state[f"absmax{name}"]
            moment = beta * moment + (1 - beta) * power
            state[f"absmax{name}"] = scale = moment.abs().max()
            state[f"state{name}"] = (moment / scale.clamp(min=1e-30) * 127).round().to(torch.int8)
            moments.append(moment / (1 - beta ** state["step"]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(group["lr"] * moments[0] / (moments[1].sqrt() + group["eps"]))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `from bitsandbytes.optim import AdamW8bit` find the real one, or the stand-in."""
    if find_spec("bitsandbytes") is None:
        package, module = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
        module.AdamW8bit = AdamW8bit  # type: ignore[attr-defined]
        package.optim = module  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "bitsandbytes", package)
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
