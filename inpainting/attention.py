"""Attention by the faster of two ways, chosen by its size."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

# Up to here plain matrix products take 0.5 to 1.1 of the time of the CPU's fused attention in fp32
# and 0.1 to 0.5 in bf16; with 1024 keys 1.1 to 3 times as long (docs/benchmarks).
FEW_KEYS = 256


class FittingAttention:
    """A processor for diffusers' attention layers: fused, or on a CPU plain where that is faster.

    What it chooses depends on the number of keys alone: the same step gets the same bits.
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
        is_plain = hidden_states.device.type == "cpu" and keys.shape[1] <= FEW_KEYS
        processor = self.plain if is_plain else self.fused
        return processor(attn, hidden_states, encoder_hidden_states, **kwargs)
