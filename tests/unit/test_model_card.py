"""The model card: it says what was trained, and its program runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetInpaintPipeline
from PIL import Image

from demo.random_base import write_random_base
from inpainting.checkpoints import write_final_model
from inpainting.holes import cover_cells
from inpainting.model_card import format_model_card
from tests.final_model import make_controlnet, make_record


def snippet_of(card: str) -> str:
    match = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert match, card
    return match[1]


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_cards_program_runs_as_it_stands(
    stride: int, prediction_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_random_base(tmp_path / "my-base", stride=stride, prediction_type=prediction_type)
    write_final_model(
        tmp_path / "final_model",
        controlnet=make_controlnet(base, stride=stride),
        record=make_record(vae_stride=stride, prediction_type=prediction_type),
        training={},
    )
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[17:40, 21:50] = 255  # no edge is a latent cell's
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    pipeline_class, calls = StableDiffusionControlNetInpaintPipeline, []

    def fill(self: object, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return call(self, **kwargs)

    call = pipeline_class.__call__
    monkeypatch.setattr(pipeline_class, "__call__", fill)

    variables: dict = {}
    exec(snippet_of(Path("final_model/README.md").read_text()), variables)

    control_image = variables["control_image"][0].permute(1, 2, 0).numpy()
    assert (control_image[mask == 255] == -1.0).all()
    known = pixels[mask == 0].astype(np.float32) / 255
    assert np.array_equal(control_image[mask == 0], known)
    assert variables["pipe"].scheduler.config.prediction_type == prediction_type
    assert variables["pipe"].scheduler.config.timestep_spacing == "trailing"
    assert calls[0]["controlnet_conditioning_scale"] == 1.0
    filled = cover_cells(torch.from_numpy(mask // 255)[None, None], stride=stride)
    assert np.array_equal(np.asarray(calls[0]["mask_image"]), filled[0, 0].bool().numpy())
    result = np.asarray(Image.open("inpainted.png"))
    assert np.array_equal(result[mask == 0], pixels[mask == 0])
    assert not np.array_equal(result[mask == 255], pixels[mask == 255])


def test_the_card_says_what_was_trained() -> None:
    card = format_model_card(
        make_record(base="stable-diffusion-v1-5/stable-diffusion-v1-5", base_unet_sha256=None),
        num_parameters=361_279_120,
        training={"learning rate": 1e-5},
    )
    for text in (
        "base_model: stable-diffusion-v1-5/stable-diffusion-v1-5\n",
        "361,279,120 parameters",
        "| picture size | 64 px |",
        "| prediction type | epsilon |",
        "| optimizer steps | 1,234 |",
        "| learning rate | 1e-05 |",
        "## Licence",
    ):
        assert text in card
    assert "base_model" not in format_model_card(make_record(), num_parameters=1, training={})
    single = format_model_card(make_record(base="a.ckpt"), num_parameters=1, training={})
    assert ".from_single_file(\n" in single
    for left_over in re.findall(r"TODO|\{[a-z_]+\}|More Information", card):
        pytest.fail(left_over)
