"""Which way attention is computed, by size and by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.networks import SIZES, build_base
from inpainting.attention import (
    BACKENDS,
    FEW_KEYS,
    FittingAttention,
    SelfAttention,
    encoder_attentions,
    prefer,
    time_backends,
)

CPU = torch.device("cpu")
SMALL = [SelfAttention(batch=2, heads=3, cells=16, head_channels=8)]


def attend(processor: object, *, dtype: torch.dtype, num_keys: int, is_mixed: bool) -> torch.Tensor:
    """Return what an attention layer makes of the same 8 tokens with this processor."""
    torch.manual_seed(0)
    layer = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8)
    tokens, context = torch.randn(2, 8, 16), torch.randn(2, num_keys, 12)
    layer.set_processor(processor)  # type: ignore[arg-type]
    if is_mixed:
        with torch.autocast("cpu", dtype=dtype):
            return layer(tokens, context)
    return layer.to(dtype)(tokens.to(dtype), context.to(dtype))


@pytest.mark.parametrize(
    ("dtype", "is_mixed"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize(
    ("num_keys", "chosen", "other"),
    [(FEW_KEYS, AttnProcessor, AttnProcessor2_0), (FEW_KEYS + 1, AttnProcessor2_0, AttnProcessor)],
)
def test_attention_is_that_of_the_processor_which_is_faster_at_this_size(
    dtype: torch.dtype, is_mixed: bool, num_keys: int, chosen: type, other: type
) -> None:
    def result(processor: object) -> torch.Tensor:
        return attend(processor, dtype=dtype, num_keys=num_keys, is_mixed=is_mixed)

    got = result(FittingAttention())
    assert torch.equal(got, result(chosen()))
    assert not torch.equal(got, result(other()))
    torch.testing.assert_close(got, result(other()), rtol=0.02, atol=0.02)


# ---- by the clock


def preferred() -> SDPBackend:
    """Return the backend that comes first at the moment."""
    return SDPBackend(torch._C._get_sdp_priority_order()[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_the_preferred_backend_comes_first_and_all_others_after_it(name: str) -> None:
    before = torch._C._get_sdp_priority_order()
    with prefer(name):
        assert preferred() == BACKENDS[name]
        assert torch.backends.cuda.math_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch._C._get_sdp_priority_order() == before
    with prefer(None):
        assert torch._C._get_sdp_priority_order() == before


def test_the_sizes_are_those_of_the_encoders_layers() -> None:
    unet, seen = build_base(SIZES["small"]).unet, []
    for block in unet.down_blocks:
        for module in block.modules():
            if isinstance(module, Attention) and not module.is_cross_attention:
                query = module.to_q
                query.register_forward_hook(
                    lambda _, __, out, heads=module.heads: seen.append((*out.shape, heads))
                )
    with torch.no_grad():
        unet(
            torch.randn(3, 4, 16, 16), torch.tensor(5),
            torch.randn(3, 77, unet.config["cross_attention_dim"]),
        )  # fmt: skip
    assert len(seen) == 3
    assert encoder_attentions(unet, batch_size=3, latent_size=16) == [
        SelfAttention(batch, heads, cells, channels // heads)
        for batch, cells, channels, heads in seen
    ]


def replace_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, attend: Callable[[Tensor], Tensor]
) -> None:
    """Let one backend's outputs be something else; torch has one for all on a CPU."""
    original = F.scaled_dot_product_attention

    def by_backend(*qkv: Tensor) -> Tensor:
        output = original(*qkv)
        return attend(output) if preferred() == BACKENDS[name] else output

    monkeypatch.setattr(F, "scaled_dot_product_attention", by_backend)


def slow(output: Tensor) -> Tensor:
    time.sleep(0.005)
    return output


def refusing(output: Tensor) -> Tensor:
    raise RuntimeError("no valid execution plan")


def test_what_takes_longer_is_measured_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_attention(monkeypatch, "cudnn", slow)
    times = time_backends(SMALL, device=CPU, dtype=torch.float32)
    assert times.keys() == BACKENDS.keys()
    assert times["cudnn"] > 5
    assert times["cudnn"] > max(times["flash"], times["efficient"])


@pytest.mark.parametrize(
    "attend",
    [refusing, lambda output: 1.1 * output, lambda output: output * torch.nan],
    ids=["refuses", "wrong", "NaN"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_that_fails_or_errs_is_left_out(
    attend: Callable[[Tensor], Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_attention(monkeypatch, "efficient", attend)
    assert time_backends(SMALL, device=CPU, dtype=dtype).keys() == {"flash", "cudnn"}


def test_rounding_alone_leaves_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_attention(monkeypatch, "flash", lambda output: output.bfloat16().to(output.dtype))
    assert "flash" in time_backends(SMALL, device=CPU, dtype=torch.float32)


def test_timing_leaves_the_runs_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    time_backends(SMALL, device=CPU, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
