from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from inpainting.convolutions import FEWEST_CELLS, WinogradConv2d, use_winograd
from tests import tiny

HAS_NNPACK = torch.backends.cpu.get_cpu_capability().startswith("AVX") and (
    torch.backends.nnpack.is_available()
)
needs_nnpack = pytest.mark.skipif(not HAS_NNPACK, reason="torch has no NNPACK for this processor")


def pair(**geometry: int) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Return a convolution from 8 to 12 channels, and its like after `use_winograd`."""
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 12, **{"kernel_size": 3, "padding": 1, **geometry})  # type: ignore[arg-type]
    sparing = copy.deepcopy(plain)
    use_winograd(sparing)
    return plain, sparing


def count_nnpack(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    convolve = torch._nnpack_spatial_convolution

    def count(*args: object) -> torch.Tensor:
        calls.append(1)
        return convolve(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "_nnpack_spatial_convolution", count)
    return calls


@needs_nnpack
@pytest.mark.parametrize("size", [(24, 24), (24, 61), (37, 40), (64, 64)])
@pytest.mark.parametrize("padding", [0, 1])
def test_winograds_results_are_the_convolutions(size, padding: int, monkeypatch) -> None:
    plain, sparing = pair(padding=padding)
    image = torch.randn(2, 8, *size)
    calls = count_nnpack(monkeypatch)
    with torch.no_grad():
        got, expected = sparing(image), plain.double()(image.double())
    assert calls
    # F(6 x 6, 3 x 3) loses a decimal or two of float32's seven
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4 * float(expected.std()))


@needs_nnpack
@pytest.mark.parametrize(
    ("geometry", "size", "dtype"),
    [
        ({"kernel_size": 1, "padding": 0}, 32, torch.float32),
        ({"stride": 2}, 32, torch.float32),
        ({}, FEWEST_CELLS - 1, torch.float32),
        ({}, 32, torch.bfloat16),
    ],
    ids=["1x1", "stride 2", "few cells", "bf16"],
)
def test_what_doesnt_fit_is_computed_as_ever(geometry, size: int, dtype, monkeypatch) -> None:
    plain, sparing = (layer.to(dtype) for layer in pair(**geometry))
    image = torch.randn(1, 8, size, size).to(dtype)
    calls = count_nnpack(monkeypatch)
    assert torch.equal(sparing(image), plain(image))
    assert not calls


@needs_nnpack
def test_a_vae_stays_what_it_was_but_for_rounding() -> None:
    vae = tiny.base().vae
    nn.Module.to(vae, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sparing = copy.deepcopy(vae)
    use_winograd(sparing)
    layers = [layer for layer in sparing.modules() if isinstance(layer, nn.Conv2d)]
    assert layers
    assert all(type(layer) is WinogradConv2d for layer in layers)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        got, expected = (network.encode(image)[0].mean for network in (sparing, vae))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        got, expected = (network.decode(expected)[0] for network in (sparing, vae))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    for name, tensor in vae.state_dict().items():
        assert torch.equal(sparing.state_dict()[name], tensor), name
    sparing.encode(image.requires_grad_())[0].mean.sum().backward()  # its weights still allow it
    assert image.grad is not None


@needs_nnpack
def test_a_process_that_convolves_nothing_else_can() -> None:
    """NNPACK refuses until somebody has asked whether it is there."""
    script = """
import torch
from inpainting.convolutions import use_winograd
layer = torch.nn.Conv2d(8, 8, 3, padding=1)
use_winograd(layer)
print(tuple(layer(torch.zeros(1, 8, 32, 32)).shape), type(layer).__name__)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "(1, 8, 32, 32) WinogradConv2d", run.stderr


def test_a_processor_that_wasnt_measured_keeps_its_convolutions(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    layer = nn.Conv2d(8, 8, 3)
    use_winograd(layer)
    assert type(layer) is nn.Conv2d
