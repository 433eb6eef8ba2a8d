from __future__ import annotations

import shutil

import pytest
import torch
from diffusers.models.unets.unet_2d_blocks import UpBlock2D

from inpainting.compiling import compile_step


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_gradients_reach_through_a_frozen_upsampling_block() -> None:
    # Really compiled: the fault that this watches for is made where torch orders its kernels.
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = UpBlock2D(
        in_channels=32, prev_output_channel=32, out_channels=32, temb_channels=32, num_layers=1
    ).requires_grad_(False)
    hidden, residual, embedding = (
        torch.randn(1, 32, 4, 4),
        torch.randn(1, 32, 4, 4),
        torch.randn(1, 32),
    )

    def step(hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return block(hidden, (residual,), embedding).square().mean()

    def gradients(step) -> tuple[torch.Tensor, ...]:
        inputs = (hidden.clone().requires_grad_(), residual.clone().requires_grad_())
        return torch.autograd.grad(step(*inputs), inputs)

    expected = gradients(step)
    got = gradients(compile_step(step, block, mode="full"))
    assert all(gradient.norm() > 0 for gradient in expected)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
