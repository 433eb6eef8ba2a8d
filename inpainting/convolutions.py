"""Convolutions with fewer multiplications on a CPU."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

# With fewer cells along a side the tiles of 6 x 6 results are margin for the most part; with fewer
# channels bringing the cells to tiles and back costs more than it saves.
FEWEST_CELLS, FEWEST_CHANNELS = 24, 32


class WinogradConv2d(nn.Conv2d):
    """A convolution that takes Winograd's algorithm where that is faster.

    It is NNPACK's, which comes with torch: 64 multiplications instead of 324 for 6 x 6 results, up
    to three times as fast as oneDNN (docs/benchmarks). It rounds more coarsely, by up to 1e-4 of
    what results usually are instead of 3e-6: a hundredth of what bf16 does. Gradients are computed
    as ever.

    Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        is_faster = (
            has_winograd(input.device, input.dtype)  # first: a GPU is asked nothing more
            and (self.kernel_size, self.stride) == ((3, 3), (1, 1))
            and min(self.in_channels, self.out_channels) >= FEWEST_CHANNELS
            and min(input.shape[-2:]) >= FEWEST_CELLS
        )
        if not is_faster:
            return super()._conv_forward(input, weight, bias)
        padding = cast(tuple[int, int], self.padding)
        # One by one: for more pictures NNPACK has another way, no faster than oneDNN.
        pictures = [
            torch._nnpack_spatial_convolution(picture, weight, bias, padding)
            for picture in input.split(1)
        ]
        return torch.cat(pictures) if len(pictures) > 1 else pictures[0]


def has_winograd(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a WinogradConv2d takes Winograd's algorithm here.

    In float32 on an x86 CPU, in a process with one thread: with two, torch's own wait for work
    where NNPACK's have theirs to do, and a small VAE takes half as long again. Neither autocast nor
    torch.compile knows NNPACK.
    """
    return (
        not torch.compiler.is_compiling()
        and device.type == "cpu"
        and dtype == torch.float32
        and torch.get_num_threads() == 1
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and torch.backends.nnpack.is_available()  # asking starts NNPACK
    )


def use_winograd(network: nn.Module) -> None:
    """Make a network's convolutions WinogradConv2d."""
    for layer in network.modules():
        if type(layer) is nn.Conv2d:
            assert (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")
            assert isinstance(layer.padding, tuple)
            layer.__class__ = WinogradConv2d


def lay_out(network: nn.Module) -> None:
    """Put a network's weights in the order that its convolutions are fastest in.

    That depends on device and dtype: after each change of them. Channels last are what GPUs
    compute in, and make a CPU's bf16 8 to 20 % faster (docs/benchmarks); NNPACK's results are
    channels first, and each layer between would have to bring them back.
    """
    parameter = next(network.parameters())
    is_first = has_winograd(parameter.device, parameter.dtype)
    layout = torch.contiguous_format if is_first else torch.channels_last
    nn.Module.to(network, memory_format=layout)  # type: ignore[call-overload]
