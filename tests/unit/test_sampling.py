from __future__ import annotations

from collections.abc import Iterator
from functools import partial
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

from demo.random_base import write_random_base
from inpainting import infer_flags, sampling
from inpainting.diffusion import HOLE_VALUE
from inpainting.holes import fill_hole, grow_mask

SETTINGS: dict[str, Any] = {
    "prompt": "a bench", "negative_prompt": "", "seeds": [7], "num_inference_steps": 2,
    "guidance_scale": 2.0, "conditioning_scale": 1.0, "strength": 1.0, "image_size": 64,
    "crop_to_mask": False, "mask_blur": 0,
}  # fmt: skip
NOT_OF_THE_NETWORKS = ("image_size", "crop_to_mask", "mask_blur")


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
    (result,) = sampling.inpaint(pipeline, image=image, mask=mask, **{**SETTINGS, **overrides})
    return result


# Settings


def test_command_offers_exactly_the_samplers() -> None:
    assert tuple(sampling.SCHEDULERS) == infer_flags.SCHEDULERS


@pytest.mark.parametrize("name", sampling.SCHEDULERS)
def test_sampler_follows_the_training_schedule(name: str) -> None:
    trained = DDPMScheduler(
        beta_start=0.001, beta_end=0.02, beta_schedule="scaled_linear",
        prediction_type="v_prediction", timestep_spacing="leading",
    )  # fmt: skip
    sampler = sampling.make_scheduler(name, trained)
    config = sampler.config
    sampler.set_timesteps(4)

    assert sampler.timesteps.tolist() == [999, 749, 499, 249], "starts where there is only noise"
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
    other = inpaint(pipeline, image=image, mask=mask, seeds=[8], **settings)
    again = inpaint(pipeline, image=image, mask=mask, **settings)

    assert result.shape == image.shape
    assert result.dtype == np.uint8
    assert np.array_equal(result[mask == 0], image[mask == 0])
    assert (result != image)[mask == 1].mean() > 0.9
    assert np.array_equal(result, again), "a call depends on the calls before it"
    assert not np.array_equal(result, other)


def test_samples_of_one_batch_are_what_their_seeds_give_alone(
    pipeline: sampling.InpaintPipeline, image: np.ndarray, mask: np.ndarray
) -> None:
    settings = {**SETTINGS, "seeds": [7, 8, 9]}
    batch = sampling.inpaint(pipeline, image=image, mask=mask, **settings)
    alone = [inpaint(pipeline, image=image, mask=mask, seeds=[seed]) for seed in (7, 8, 9)]

    # Kernels add up in another order for another batch: a value that is nearly half a grey level
    # may be rounded the other way, nothing more.
    difference = np.abs(np.stack(batch).astype(int) - np.stack(alone))
    assert difference.max() <= 1
    assert not np.array_equal(batch[0], batch[1])


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
    far = grow_mask(mask, radius_px=4) == 0

    assert np.array_equal(result[far], image[far])
    assert not np.array_equal(result[mask == 0], image[mask == 0])


def test_a_hole_thinner_than_a_cell_is_denoised(
    pipeline: sampling.InpaintPipeline, image: np.ndarray
) -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[33:35] = 1  # nearest sampling looks at rows 0, 8, 16 ...
    picture = image[:64, :64]
    steered, unsteered = (
        inpaint(pipeline, image=picture, mask=mask, conditioning_scale=scale) for scale in (1, 0)
    )

    # A lost hole is decoded from the known latents, whatever the networks say.
    assert (steered != unsteered)[mask == 1].mean() > 0.5


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
    picture = fill_hole(picture, mask=hole)
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
    expected = np.rint(expected * 255)
    settings = {name: SETTINGS[name] for name in SETTINGS if name not in NOT_OF_THE_NETWORKS}
    working = sampling.make_working(pipeline, image=picture, mask=hole, image_size=64)
    (fill,) = sampling.draw_fills(pipeline, working, **settings)
    paste = partial(sampling.paste, fill, image=picture, mask=hole, working=working)
    result = paste(meets_edge=False)

    # Rounding at exactly half a level may differ between the two ways to scale.
    difference = np.abs(result[hole == 1] - expected[hole == 1])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001
    # What the command gives differs by no more than a cell from the edge.
    met = inpaint(pipeline, image=picture, mask=hole)
    assert np.array_equal(met, paste())
    is_changed = (met != result).any(axis=-1)
    assert is_changed[17, 9:47].all()
    assert not is_changed[16 + 8 : 40 - 8, 8 + 8 : 48 - 8].any()


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


@pytest.mark.parametrize("name", sampling.SCHEDULERS)
def test_between_the_steps_of_16_bit_networks_everything_is_in_float32(
    name: str,
    parts: dict[str, Any],
    noise_scheduler: DDPMScheduler,
    image: np.ndarray,
    mask: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler = sampling.make_scheduler(name, noise_scheduler)
    pipeline = sampling.make_pipeline(**parts, scheduler=scheduler)
    dtypes, take_step = set(), scheduler.step

    def step(model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        result = take_step(model_output, timestep, sample, **kwargs)
        dtypes.update({model_output.dtype, sample.dtype, result[0].dtype})
        return result

    monkeypatch.setattr(scheduler, "step", step)
    for network in (pipeline.unet, pipeline.controlnet):
        network.to(torch.bfloat16)
    try:
        inpaint(pipeline, image=image, mask=mask)
    finally:
        for network in (pipeline.unet, pipeline.controlnet):
            network.to(torch.float32)

    assert dtypes == {torch.float32}
    assert not pipeline.unet._forward_hooks, "training goes on with this UNet"


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
