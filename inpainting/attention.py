"""Attention by the faster of two ways, chosen by its size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

# In bf16 the CPU's fused attention takes 1.2 to 8 times as long as plain matrix products up to here
# (docs/benchmarks), and a third as long with 1024 keys.
FEW_KEYS = 256


class FittingAttention:
    """A processor for diffusers' attention layers: fused, or on a CPU plain where that is faster.

    What it chooses depends on the shapes and the dtype alone: the same step gets the same bits.
    """

    def __init__(self) -> None:
        self.fused, self.plain = AttnProcessor2_0(), AttnProcessor()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend from (B, N, C) to (B, M, D), or to itself; returns (B, N, C)."""
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        dtype = hidden_states.dtype
        if torch.is_autocast_enabled(hidden_states.device.type):
            dtype = torch.get_autocast_dtype(hidden_states.device.type)
        is_plain = (
            hidden_states.device.type == "cpu"
            and dtype == torch.bfloat16
            and keys.shape[1] <= FEW_KEYS
        )
        processor = self.plain if is_plain else self.fused
        return processor(attn, hidden_states, encoder_hidden_states, **kwargs)
