"""The base's bars, on cases with a known answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from demo import measure_base
from demo.measure_base import caption_share, draw_samples, reconstruction_psnr
from inpainting.diffusion import normalize_image
from tests import tiny


def test_a_reconstruction_ten_levels_off_has_its_known_psnr() -> None:
    image = torch.full((3, 3, 8, 8), 100, dtype=torch.uint8)
    offsets = torch.tensor([10.0, 20.0, 10.3])[:, None, None, None]  # the last is rounded to 10
    off = normalize_image(image) + offsets / 127.5
    vae = SimpleNamespace(
        encode=lambda pixels: SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels)),
        decode=lambda latents: SimpleNamespace(sample=off),
    )
    base: Any = SimpleNamespace(vae=vae)
    psnr = reconstruction_psnr(base, image)
    assert psnr.tolist() == pytest.approx([28.1308, 22.1102, 28.1308], abs=1e-3)


def base_whose_error_is_the_prompts_number(monkeypatch: pytest.MonkeyPatch) -> Any:
    base = tiny.base()
    monkeypatch.setattr(measure_base, "tokenize", lambda _, caption: torch.tensor([int(caption)]))

    def unet(noisy_latents: Tensor, timesteps: Tensor, hidden_states: Tensor, **_: bool) -> Any:
        return (torch.zeros_like(noisy_latents) + 100.0 * hidden_states[0, 0, 0],)

    return SimpleNamespace(
        stride=base.stride,
        vae=base.vae,
        tokenizer=None,
        noise_scheduler=base.noise_scheduler,
        encode_image=base.encode_image,
        sample_latents=base.sample_latents,
        encode_prompt=lambda input_ids: input_ids.float()[..., None],
        unet=unet,
    )


def test_the_share_counts_pictures_whose_own_caption_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_whose_error_is_the_prompts_number(monkeypatch)
    image = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    # Each is compared with the next one's, the last with the first one's.
    assert caption_share(base, image, captions=["1", "2", "3", "4"]) == 0.75
    assert caption_share(base, image, captions=["4", "3", "2", "1"]) == 0.25
    assert caption_share(base, image, captions=["5", "5", "5", "5"]) == 0.0


def test_the_sheet_has_a_cell_for_each_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_base, "NUM_STEPS", 1)
    captions = [f"a red house number {number}" for number in range(5)]
    sheet = draw_samples(tiny.base_folder(), captions=captions)
    assert sheet.size == (4 * 256, 2 * (256 + 66))
    assert sheet.crop((0, 256, 256, 256 + 66)).getextrema() != ((255, 255),) * 3, "no words"
    assert sheet.crop((256, 256 + 66, 1024, 2 * (256 + 66))).getextrema() == ((255, 255),) * 3
