"""The VAE's convolutions, with fewer multiplications on a CPU."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

# With fewer cells along a side the tiles of 6 x 6 results are margin for the most part.
FEWEST_CELLS = 24


class WinogradConv2d(nn.Conv2d):
    """A frozen convolution that on a CPU, in float32, takes Winograd's algorithm where it fits.

    That is NNPACK's, which comes with torch: 64 multiplications instead of 324 for 6 x 6 results,
    1.1 to 3 times as fast as oneDNN (docs/benchmarks). It rounds more coarsely, by up to 1e-4 of
    what results usually are instead of 3e-6: a hundredth of what bf16 does, and little beside the
    float16 that moments are kept in.

    Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32:
            return super()._conv_forward(input, weight, bias)
        if weight.stride(-1) != 1:
            # Channels last, but what NNPACK returns isn't: the layers between had better not be.
            with torch.inference_mode(False):  # what is cloned in it lets no gradient through
                weight = weight.clone(memory_format=torch.contiguous_format)
            self.weight.data = weight
        is_small = min(input.shape[-2:]) < FEWEST_CELLS
        if is_small or self.kernel_size != (3, 3) or self.stride != (1, 1):
            return super()._conv_forward(input, weight, bias)
        padding = cast(tuple[int, int], self.padding)
        return torch._nnpack_spatial_convolution(input, weight, bias, padding)


def use_winograd(network: nn.Module) -> None:
    """Make a network's convolutions WinogradConv2d, if this machine has what that needs.

    NNPACK runs on other processors than x86 too; whether it is faster there wasn't measured.
    """
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    if is_x86 and torch.backends.nnpack.is_available():  # asking starts NNPACK
        for layer in network.modules():
            if type(layer) is nn.Conv2d:
                assert (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")
                layer.__class__ = WinogradConv2d
