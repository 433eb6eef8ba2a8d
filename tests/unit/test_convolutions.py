from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from inpainting.convolutions import (
    FEWEST_CELLS,
    FEWEST_CHANNELS,
    WinogradConv2d,
    has_winograd,
    lay_out,
    use_winograd,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HAS_NNPACK = torch.backends.cpu.get_cpu_capability().startswith("AVX") and (
    torch.backends.nnpack.is_available()
)
needs_nnpack = pytest.mark.skipif(not HAS_NNPACK, reason="torch has no NNPACK for this processor")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.fixture
def nnpack_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of NNPACK is given."""
    sizes: list[int] = []
    convolve = torch._nnpack_spatial_convolution

    def count(input: torch.Tensor, *args: object) -> torch.Tensor:
        sizes.append(len(input))
        return convolve(input, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "_nnpack_spatial_convolution", count)
    return sizes


def pair(**geometry: int) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Return a convolution from 32 to 48 channels, and its like after `use_winograd`."""
    torch.manual_seed(0)
    usual = {"in_channels": 32, "out_channels": 48, "kernel_size": 3, "padding": 1}
    plain = nn.Conv2d(**{**usual, **geometry})  # type: ignore[arg-type]
    sparing = copy.deepcopy(plain)
    use_winograd(sparing)
    return plain, sparing


@needs_nnpack
@pytest.mark.parametrize("size", [(24, 24), (24, 61), (37, 40), (64, 64)])
@pytest.mark.parametrize("padding", [0, 1])
def test_winograds_results_are_the_convolutions(size, padding: int, nnpack_batches) -> None:
    plain, sparing = pair(padding=padding)
    image = torch.randn(2, 32, *size, requires_grad=True)
    exact = image.detach().double().requires_grad_()
    got, expected = sparing(image), plain.double()(exact)
    assert nnpack_batches == [1, 1]
    # F(6 x 6, 3 x 3) loses a decimal or two of float32's seven
    torch.testing.assert_close(
        got.double(), expected, rtol=0, atol=1e-4 * float(expected.detach().std())
    )
    gradient = torch.randn_like(got)
    got.backward(gradient)
    expected.backward(gradient.double())
    for name, mine, theirs in (
        ("image", image, exact),
        ("weight", sparing.weight, plain.weight),
        ("bias", sparing.bias, plain.bias),
    ):
        assert mine.grad is not None, name
        assert theirs.grad is not None, name
        near = {"rtol": 0, "atol": 1e-5 * float(theirs.grad.std())}
        torch.testing.assert_close(mine.grad.double(), theirs.grad, **near)


@needs_nnpack
def test_a_picture_gets_the_same_bits_in_every_batch() -> None:
    _, sparing = pair()
    image = torch.randn(3, 32, 40, 40)
    together = sparing(image)
    for i in range(3):
        assert torch.equal(together[i : i + 1], sparing(image[i : i + 1])), i


@pytest.mark.parametrize(
    ("geometry", "size", "dtype"),
    [
        ({"kernel_size": 1, "padding": 0}, 32, torch.float32),
        ({"stride": 2}, 32, torch.float32),
        ({}, FEWEST_CELLS - 1, torch.float32),
        ({"in_channels": FEWEST_CHANNELS - 1}, 32, torch.float32),
        ({"out_channels": FEWEST_CHANNELS - 1}, 32, torch.float32),
        ({}, 32, torch.bfloat16),
    ],
    ids=["1x1", "stride 2", "few cells", "few channels in", "few channels out", "bf16"],
)
def test_what_doesnt_fit_is_computed_as_ever(geometry, size, dtype, nnpack_batches) -> None:
    plain, sparing = (layer.to(dtype) for layer in pair(**geometry))
    image = torch.randn(1, plain.in_channels, size, size).to(dtype)
    assert torch.equal(sparing(image), plain(image))
    assert not nnpack_batches


@needs_nnpack
def test_autocast_and_the_compiler_get_plain_convolutions(nnpack_batches) -> None:
    plain, sparing = pair()
    image = torch.randn(1, 32, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sparing(image), plain(image))
    got = torch.compile(sparing, backend="eager", fullgraph=True)(image)
    assert torch.equal(got, plain(image))
    assert not nnpack_batches
    sparing(image)
    assert nnpack_batches, "it would prove nothing"


def test_winograd_is_for_one_thread_of_an_x86_cpu_in_fp32(monkeypatch) -> None:
    assert has_winograd(CPU, torch.float32) == HAS_NNPACK
    assert not has_winograd(CPU, torch.bfloat16)
    assert not has_winograd(GPU, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        assert not has_winograd(CPU, torch.float32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    assert not has_winograd(CPU, torch.float32)


@needs_nnpack
def test_a_vae_stays_what_it_was_but_for_rounding(nnpack_batches) -> None:
    vae = AutoencoderKL(block_out_channels=(32,))
    sparing = copy.deepcopy(vae)
    use_winograd(sparing)
    lay_out(sparing)
    layers = [layer for layer in sparing.modules() if isinstance(layer, nn.Conv2d)]
    assert layers
    assert all(type(layer) is WinogradConv2d for layer in layers)
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        got, expected = (network.encode(image)[0].mean for network in (sparing, vae))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        got, expected = (network.decode(expected)[0] for network in (sparing, vae))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert nnpack_batches
    for name, tensor in vae.state_dict().items():
        assert torch.equal(sparing.state_dict()[name], tensor), name


@needs_nnpack
def test_weights_are_laid_out_for_what_computes() -> None:
    network = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Conv2d(12, 8, 1))
    for dtype, last_stride in ((torch.bfloat16, (8, 12)), (torch.float32, (1, 1))):
        network.to(dtype)
        lay_out(network)
        assert tuple(layer.weight.stride(-1) for layer in network) == last_stride, dtype  # type: ignore[union-attr, operator]


@needs_nnpack
def test_a_process_that_convolves_nothing_else_can() -> None:
    """NNPACK refuses until somebody has asked whether it is there."""
    script = """
import torch
from inpainting.convolutions import use_winograd
layer = torch.nn.Conv2d(32, 32, 3, padding=1)
use_winograd(layer)
convolve = torch._nnpack_spatial_convolution
torch._nnpack_spatial_convolution = lambda *args: print("NNPACK") or convolve(*args)
print(tuple(layer(torch.zeros(1, 32, 32, 32)).shape))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.stdout.splitlines() == ["NNPACK", "(1, 32, 32, 32)"], run.stderr
