from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDPMScheduler,
    StableDiffusionControlNetInpaintPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

import infer
from demo.random_base import write_random_base
from inpainting import sampling
from inpainting.diffusion import HOLE_VALUE

SETTINGS: dict[str, Any] = {
    "prompt": "a bench", "negative_prompt": "", "seed": 7, "num_inference_steps": 2,
    "guidance_scale": 2.0, "conditioning_scale": 1.0, "strength": 1.0, "image_size": 64,
    "crop_to_mask": False, "mask_blur": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_random_base(tmp_path_factory.mktemp("base"))
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    controlnet = ControlNetModel.from_unet(unet)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in controlnet.named_parameters():
        if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond")):
            parameter.data.normal_(0.0, 0.3, generator=generator)  # zero convolutions say nothing
    return {
        "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        "unet": unet,
        "text_encoder": CLIPTextModel.from_pretrained(folder, subfolder="text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "controlnet": controlnet.eval(),
    }


@pytest.fixture(scope="module")
def noise_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )


@pytest.fixture
def pipeline(
    parts: dict[str, Any], noise_scheduler: DDPMScheduler
) -> Iterator[sampling.InpaintPipeline]:
    yield sampling.make_pipeline(
        **parts, scheduler=sampling.make_scheduler("ddim", noise_scheduler)
    )
    for network in ("vae", "unet", "text_encoder", "controlnet"):
        parts[network].to(torch.float32)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 94, 3), dtype=np.uint8)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((70, 94), dtype=np.uint8)
    mask[20:45, 30:61] = 1
    return mask


def inpaint(
    pipeline: sampling.InpaintPipeline, *, image: np.ndarray, mask: np.ndarray, **overrides: Any
) -> np.ndarray:
    return sampling.inpaint(pipeline, image=image, mask=mask, **{**SETTINGS, **overrides})


def area_of(height: int, width: int, *, image_size: int = 64) -> sampling.WorkingArea:
    return sampling.working_area(
        np.ones((height, width), dtype=np.uint8),
        image_size=image_size, multiple=16, crop_to_mask=False, context_px=32,
    )  # fmt: skip


# Geometry


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 100), (333, 500), (17, 11), (50, 49)])
def test_short_side_gets_the_working_size_and_the_aspect_is_kept(height: int, width: int) -> None:
    area = area_of(height, width)

    assert min(area.size) == 64
    assert abs(area.size[0] / area.size[1] - width / height) <= 0.5 / 64 * width / height
    assert all(
        padded % 16 == 0 and 0 <= padded - side < 16
        for padded, side in zip(area.padded_size, area.size, strict=True)
    )


@pytest.mark.parametrize(("height", "width"), [(64, 90), (128, 201), (40, 33)])
def test_working_pixels_come_back_to_where_they_were(height: int, width: int) -> None:
    area = area_of(height, width)
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(20, 220, width)[None]
    ramp[..., 1] = np.linspace(20, 220, height)[:, None]

    returned = sampling.from_working(sampling.to_working(ramp, area=area), area=area)

    inner = np.s_[3:-3, 3:-3]  # a resize has no neighbours beyond the border
    assert np.abs(returned[inner].astype(int) - ramp[inner]).max() <= 2


def test_padding_mirrors_picture_and_hole_alike(image: np.ndarray) -> None:
    mask = np.zeros((70, 94), dtype=np.uint8)
    mask[:, -6:] = 1
    area = sampling.working_area(
        mask, image_size=70, multiple=16, crop_to_mask=False, context_px=32
    )
    working = sampling.to_working(image, area=area)
    working_mask = sampling.mask_to_working(mask, area=area)

    assert working.shape == (80, 96, 3)
    assert np.array_equal(working[:70, :94], image)
    assert np.array_equal(working[:70, 94:], image[:, [92, 91]])
    assert np.array_equal(working[70:, :94], image[68:58:-1])
    assert working_mask[:, 88:].all()
    assert not working_mask[:, :88].any()


def test_crop_holds_the_hole_with_its_context_inside_the_picture() -> None:
    mask = np.zeros((400, 600), dtype=np.uint8)
    mask[10:20, 200:300] = 1
    area = sampling.working_area(mask, image_size=64, multiple=16, crop_to_mask=True, context_px=32)

    assert (area.rows, area.columns) == (slice(0, 70), slice(150, 350))
    assert area.size == (183, 64)


def test_a_hole_of_one_pixel_survives_the_resize_and_the_cells() -> None:
    mask = np.zeros((1000, 1000), dtype=np.uint8)
    mask[501, 333] = 1
    working = sampling.mask_to_working(mask, area=area_of(1000, 1000))
    cells = sampling.cover_cells(torch.from_numpy(working)[None, None], stride=8)

    assert working.sum() == 1
    assert cells.sum() == 64
    assert cells[0, 0, 32:40, 16:24].all()


# Masks


def test_mask_of_another_size_is_fitted_and_keeps_thin_holes() -> None:
    mask = np.zeros((500, 1000), dtype=np.uint8)
    mask[250] = 1
    fitted = sampling.fit_mask(mask, height=50, width=100)

    assert fitted.shape == (50, 100)
    assert np.array_equal(np.flatnonzero(fitted.any(axis=1)), [25])
    assert sampling.fit_mask(mask, height=333, width=667).shape == (333, 667)
    with pytest.raises(ValueError, match=r"mask of 1000x500 for a picture of 500x1000"):
        sampling.fit_mask(mask, height=1000, width=500)


def test_mask_grows_by_so_many_pixels() -> None:
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[10, 1] = 1
    grown = sampling.grow_mask(mask, radius_px=3)

    expected = np.zeros_like(mask)
    expected[7:14, 0:5] = 1
    assert np.array_equal(grown, expected)


@pytest.mark.parametrize("width_px", [1, 2, 5, 8])
def test_fill_fades_outside_the_hole_only(width_px: int) -> None:
    mask = np.zeros((40, 80), dtype=np.uint8)
    mask[:, :40] = 1
    mask[20, 60] = 1  # a thin hole, which a plain blur would leave half transparent
    weight = sampling.fade_mask(mask, width_px=width_px)

    assert np.all(weight[mask == 1] == 255)
    assert np.all(np.diff(weight[0, :60].astype(int)) <= 0)
    assert np.all(weight[0, 40 : 40 + width_px] > 0)
    assert np.all(weight[0, 40 + width_px :] == 0)


# Pixels


def test_hole_is_filled_from_known_pixels_alone(image: np.ndarray, mask: np.ndarray) -> None:
    filled = sampling.fill_hole(image, mask=mask)
    other = sampling.fill_hole(np.where(mask[..., None] == 1, 255 - image, image), mask=mask)

    assert np.array_equal(filled[mask == 0], image[mask == 0])
    assert np.array_equal(filled, other)


def test_hole_continues_its_surroundings() -> None:
    image = np.zeros((60, 100, 3), dtype=np.uint8)
    image[:, 50:] = 200
    mask = np.zeros((60, 100), dtype=np.uint8)
    mask[20:40, 10:90] = 1
    row = sampling.fill_hole(image, mask=mask)[30, :, 0].astype(int)

    assert row[:30].max() <= 10
    assert row[70:].min() >= 190
    assert np.all(sampling.fill_hole(image, mask=np.ones_like(mask)) == 128)


def test_blend_returns_exact_bits_at_both_ends(image: np.ndarray) -> None:
    fill = 255 - image
    weight = np.zeros(image.shape[:2], dtype=np.uint8)
    weight[30:] = 255
    weight[:, 50] = 51
    mixed = sampling.blend(image, fill=fill, weight=weight)

    assert np.array_equal(mixed[weight == 0], image[weight == 0])
    assert np.array_equal(mixed[weight == 255], fill[weight == 255])
    assert np.array_equal(
        mixed[:, 50], np.rint(0.8 * image[:, 50] + 0.2 * fill[:, 50].astype(float))
    )


# Settings


def test_command_offers_exactly_the_samplers() -> None:
    assert tuple(sampling.SCHEDULERS) == infer.SCHEDULERS


@pytest.mark.parametrize("name", sampling.SCHEDULERS)
def test_sampler_follows_the_training_schedule(name: str) -> None:
    trained = DDPMScheduler(
        beta_start=0.001, beta_end=0.02, beta_schedule="scaled_linear",
        prediction_type="v_prediction",
    )  # fmt: skip
    config = sampling.make_scheduler(name, trained).config

    assert config["prediction_type"] == "v_prediction"
    assert (config["beta_start"], config["beta_schedule"]) == (0.001, "scaled_linear")
    assert not config.get("clip_sample", False), "latents must not be clipped to [-1, 1]"


def test_unknown_sampler_is_refused(noise_scheduler: DDPMScheduler) -> None:
    with pytest.raises(ValueError, match=r"one of ddpm, ddim.*got 'euler'"):
        sampling.make_scheduler("euler", noise_scheduler)


@pytest.mark.parametrize(
    ("steps", "strength", "message"),
    [(3, 0.3, r"got 3 x 0\.3\. Take at least 4"), (5, 0.0, r"\(0, 1\]"), (5, 1.1, r"\(0, 1\]"),
     (5, float("nan"), r"\(0, 1\]")],
)  # fmt: skip
def test_settings_without_a_step_are_refused(steps: int, strength: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling.check_steps(num_inference_steps=steps, strength=strength)


def test_settings_with_one_step_are_accepted() -> None:
    sampling.check_steps(num_inference_steps=4, strength=0.25)
    sampling.check_steps(num_inference_steps=1, strength=1.0)


# The whole


@pytest.mark.parametrize("name", sampling.SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 3])
def test_known_pixels_keep_their_bits_and_a_seed_its_result(
    pipeline: sampling.InpaintPipeline, noise_scheduler: DDPMScheduler, image: np.ndarray,
    mask: np.ndarray, name: str, steps: int,
) -> None:  # fmt: skip
    pipeline.scheduler = sampling.make_scheduler(name, noise_scheduler)
    settings: dict[str, Any] = {"num_inference_steps": steps}
    result = inpaint(pipeline, image=image, mask=mask, **settings)
    other = inpaint(pipeline, image=image, mask=mask, seed=8, **settings)
    again = inpaint(pipeline, image=image, mask=mask, **settings)

    assert result.shape == image.shape
    assert result.dtype == np.uint8
    assert np.array_equal(result[mask == 0], image[mask == 0])
    assert (result != image)[mask == 1].mean() > 0.9
    assert np.array_equal(result, again), "a call depends on the calls before it"
    assert not np.array_equal(result, other)


@pytest.mark.parametrize("crop_to_mask", [False, True])
def test_what_lies_under_the_hole_reaches_no_bit_at_strength_1(
    pipeline: sampling.InpaintPipeline, image: np.ndarray, mask: np.ndarray, crop_to_mask: bool
) -> None:
    changed = np.where(mask[..., None] == 1, 255 - image, image)
    settings: dict[str, Any] = {"crop_to_mask": crop_to_mask, "mask_blur": 5}
    result = inpaint(pipeline, image=image, mask=mask, **settings)

    assert np.array_equal(result, inpaint(pipeline, image=changed, mask=mask, **settings))


def test_what_lies_under_the_hole_is_started_from_below_strength_1(
    pipeline: sampling.InpaintPipeline, image: np.ndarray, mask: np.ndarray
) -> None:
    changed = np.where(mask[..., None] == 1, 255 - image, image)
    settings: dict[str, Any] = {"strength": 0.5}
    result = inpaint(pipeline, image=image, mask=mask, **settings)

    assert not np.array_equal(result, inpaint(pipeline, image=changed, mask=mask, **settings))


def test_blur_changes_no_pixel_further_than_its_width(
    pipeline: sampling.InpaintPipeline, image: np.ndarray, mask: np.ndarray
) -> None:
    result = inpaint(pipeline, image=image, mask=mask, mask_blur=4)
    far = sampling.grow_mask(mask, radius_px=4) == 0

    assert np.array_equal(result[far], image[far])
    assert not np.array_equal(result[mask == 0], image[mask == 0])


def test_a_hole_thinner_than_a_cell_is_denoised(
    pipeline: sampling.InpaintPipeline, image: np.ndarray
) -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[33:35] = 1  # nearest sampling looks at rows 0, 8, 16 ...
    results = [
        inpaint(pipeline, image=image[:64, :64], mask=mask, seed=seed)[mask == 1] for seed in (0, 1)
    ]

    # Lost holes would be decoded from the same known latents, whatever the noise.
    assert (results[0] != results[1]).mean() > 0.9


def test_controlnet_sees_the_hole_marked_and_steers(
    pipeline: sampling.InpaintPipeline, image: np.ndarray, mask: np.ndarray
) -> None:
    seen: list[torch.Tensor] = []
    hook = pipeline.controlnet.controlnet_cond_embedding.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    picture, hole = image[:64, :64], mask[:64, :64]
    result = inpaint(pipeline, image=picture, mask=hole)
    hook.remove()
    unsteered = inpaint(pipeline, image=picture, mask=hole, conditioning_scale=0.0)

    known = torch.from_numpy(hole == 0)
    assert (seen[0][0][:, ~known] == HOLE_VALUE).all()
    expected = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
    assert torch.equal(seen[0][0][:, known], expected[:, known])
    assert not np.array_equal(result, unsteered)


def test_equals_diffusers_where_nothing_has_to_be_mended(
    parts: dict[str, Any], noise_scheduler: DDPMScheduler, pipeline: sampling.InpaintPipeline
) -> None:
    """Working size, a hole of whole cells, neutral beneath: same bits as a plain call."""
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    hole = np.zeros((64, 64), dtype=np.uint8)
    hole[16:40, 8:48] = 1
    picture = sampling.fill_hole(picture, mask=hole)
    others: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    plain: Any = StableDiffusionControlNetInpaintPipeline(
        **parts, **others, requires_safety_checker=False,
        scheduler=sampling.make_scheduler("ddim", noise_scheduler),  # type: ignore[arg-type]
    )  # fmt: skip
    plain.set_progress_bar_config(disable=True)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    marked = torch.from_numpy(hole)[None, None]
    expected = plain(
        "a bench", pixels, marked.float(), torch.where(marked == 1, -1.0, pixels),
        num_inference_steps=2, guidance_scale=2.0, strength=1.0,
        generator=torch.Generator().manual_seed(7), output_type="np",
    ).images[0]  # fmt: skip
    result = inpaint(pipeline, image=picture, mask=hole)

    # Rounding at exactly half a level may differ between the two ways to scale.
    difference = np.abs(result[hole == 1] - np.rint(expected[hole == 1] * 255))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001


@pytest.mark.parametrize(
    ("unet", "controlnet", "text_encoder", "vae"),
    [("bfloat16", "float32", "bfloat16", "float32"), ("bfloat16", "bfloat16", "float32", "float32"),
     ("bfloat16", "float32", "float32", "bfloat16"), ("bfloat16",) * 4],
)  # fmt: skip
def test_networks_may_differ_in_dtype(
    pipeline: sampling.InpaintPipeline, image: np.ndarray, mask: np.ndarray,
    unet: str, controlnet: str, text_encoder: str, vae: str,
) -> None:  # fmt: skip
    full = inpaint(pipeline, image=image, mask=mask).astype(int)
    pipeline.unet.to(getattr(torch, unet))
    pipeline.controlnet.to(getattr(torch, controlnet))
    pipeline.text_encoder.to(getattr(torch, text_encoder))
    pipeline.vae.to(getattr(torch, vae))
    result = inpaint(pipeline, image=image, mask=mask)

    assert np.array_equal(result[mask == 0], image[mask == 0])
    if text_encoder == "float32":  # then the noise is the same, and so is the picture, roughly
        assert np.abs(result - full)[mask == 1].mean() < 20


def test_vae_stays_out_of_autocast(
    pipeline: sampling.InpaintPipeline, image: np.ndarray, mask: np.ndarray
) -> None:
    dtypes = set()
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output: dtypes.add(output.dtype))
        for layer in (pipeline.vae.encoder.conv_in, pipeline.vae.decoder.conv_in)
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inpaint(pipeline, image=image, mask=mask)
    for hook in hooks:
        hook.remove()

    assert dtypes == {torch.float32}


def test_overflow_is_told_instead_of_a_black_picture(parts: dict[str, Any]) -> None:
    with pytest.raises(FloatingPointError, match=r"finite.*--precision 32"):
        sampling.decode(parts["vae"], torch.full((1, 4, 8, 8), float("nan")))


def test_pipeline_shares_the_networks_and_is_silent(
    pipeline: sampling.InpaintPipeline, parts: dict[str, Any], image: np.ndarray,
    mask: np.ndarray, capfd: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    inpaint(pipeline, image=image, mask=mask)
    captured = capfd.readouterr()

    assert all(getattr(pipeline, name) is part for name, part in parts.items())
    assert captured.out + captured.err == ""
