from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from inpainting.attention import FEW_KEYS, FittingAttention


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
