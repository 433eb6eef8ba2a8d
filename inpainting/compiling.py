"""What --compile gives to torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._inductor.config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

REPEATED_BLOCKS = (ResnetBlock2D, BasicTransformerBlock)
MAX_BLOCK_SHAPES = 64


def compile_step(
    step: Callable[..., Tensor], *networks: nn.Module, mode: str
) -> Callable[..., Tensor]:
    """Return a step, compiled when it is first taken; weights and their names stay as they are.

    Args:
        step: what runs the networks.
        networks: those that it runs.
        mode: "off"; "regional": each residual and transformer block by itself, once for all of the
            same shape; "full": the whole step at once, which takes many times as long.
    """
    if mode == "off":
        return step
    # For the whole process. Reordering, torch 2.13 lets kernels read an upsampling's gradient
    # before it is summed up, and the ControlNet's innermost gradients become zero.
    torch._inductor.config.reorder_for_peak_memory = False
    if mode == "full":
        return torch.compile(step, dynamic=False)
    # A block is compiled anew for each shape it meets; past torch's 8 it would stay as it is.
    torch._dynamo.config.recompile_limit = MAX_BLOCK_SHAPES
    for network in networks:
        for block in network.modules():
            if isinstance(block, REPEATED_BLOCKS):
                block.compile(dynamic=False)
    return step
