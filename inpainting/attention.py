"""Who computes attention: on a CPU chosen by its size, on a GPU by timing what there is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Up to here plain matrix products take 0.5 to 1.1 of the time of the CPU's fused attention in fp32
# and 0.1 to 0.5 in bf16; with 1024 keys 1.1 to 3 times as long (docs/benchmarks).
FEW_KEYS = 256
# torch's fused attentions, by the names of their authors' papers and libraries.
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
NUM_TIMED = 10
# Of a result's norm: several times what 16 bits round off.
LARGEST_ERROR = 0.02


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


def prefer(backend: str | None) -> AbstractContextManager[object]:
    """Let fused attention be computed by one of BACKENDS, and by the others where it can't.

    Args:
        backend: its name; None: in torch's own order.
    """
    if backend is None:
        return nullcontext()
    order = (BACKENDS[backend], *BACKENDS.values(), SDPBackend.MATH)
    return sdpa_kernel(list(dict.fromkeys(order)), set_priority=True)


@dataclass(frozen=True)
class SelfAttention:
    """How large one layer's attention of a picture's latent cells to each other is.

    Attributes:
        batch, heads, cells, head_channels: of its queries, keys and values.
    """

    batch: int
    heads: int
    cells: int
    head_channels: int


def encoder_attentions(
    unet: UNet2DConditionModel, *, batch_size: int, latent_size: int
) -> list[SelfAttention]:
    """Return the self-attentions of a UNet's encoder, the largest first.

    A training step's others are proportional: the ControlNet's encoder is the same, the decoder has
    a layer more at each size, and attention to a prompt's 77 tokens is little beside them.

    Args:
        unet: in diffusers' format.
        batch_size: pictures in a batch.
        latent_size: the side of a latent picture.
    """
    sizes = []
    for level, block in enumerate(unet.down_blocks):
        for transformer in getattr(block, "attentions", ()):
            layer = transformer.transformer_blocks[0].attn1
            cells = (latent_size >> level) ** 2
            sizes.append(
                SelfAttention(batch_size, layer.heads, cells, layer.inner_dim // layer.heads)
            )
    return sizes


def time_backends(
    sizes: Sequence[SelfAttention], *, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Time forward and backward of all sizes together by each of BACKENDS.

    Args:
        sizes: what is attended.
        device: where.
        dtype: of queries, keys and values.

    Returns:
        milliseconds by name; without a backend that fails, or whose results aren't those of the
        others.
    """
    from torch.utils.benchmark import Timer  # 60 ms of every start otherwise

    inputs = [_draw_inputs(size, device=device, dtype=dtype) for size in sizes]
    expected = _attend(inputs)
    times = {}
    for name in BACKENDS:
        with prefer(name):
            try:
                got = _attend(inputs)
                timer = Timer("attend(inputs)", globals={"attend": _attend, "inputs": inputs})
                elapsed_ms = timer.timeit(NUM_TIMED).median * 1e3
            except RuntimeError:  # a library's plan for these sizes that its device refuses
                continue
        errors = [
            (a - b).float().norm() / b.float().norm() for a, b in zip(got, expected, strict=True)
        ]
        if max(errors) < LARGEST_ERROR:  # NaN isn't
            times[name] = elapsed_ms
    return times


def _draw_inputs(
    size: SelfAttention, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw queries, keys and values as diffusers lays them out: heads beside each other."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own must not move
    shape = (size.batch, size.cells, size.heads, size.head_channels)
    query, key, value = (
        torch.randn(shape, generator=generator, device=device)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    )
    return query, key, value


def _attend(inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """Return all outputs and gradients."""
    results = []
    for qkv in inputs:
        output = F.scaled_dot_product_attention(*qkv)
        results += [output.detach(), *torch.autograd.grad(output, qkv, output.detach())]
    return results
