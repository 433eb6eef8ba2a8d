"""The frozen base is loaded strictly, and the ControlNet steers it without changing it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from inpainting.base import read_base_config
from inpainting.captions import tokenize
from inpainting.convolutions import WinogradConv2d
from inpainting.diffusion import make_conditioning
from model import (
    Base,
    build_controlnet,
    check_prediction_type,
    estimate_sizes,
    load_base,
    load_controlnet_weights,
    predict_noise,
)
from tests import tiny

SD15_CONFIGS = Path(__file__).parents[3] / "shared" / "weights" / "sd15_configs"
SD21_CONFIGS = SD15_CONFIGS.with_name("sd21base_configs")
NETWORKS = ("vae", "unet", "text_encoder")


def run(base: Base, controlnet, batch, *, with_controlnet: bool = True) -> torch.Tensor:
    hidden = base.encode_prompt(batch["input_ids"])
    if not with_controlnet:
        return base.unet(batch["noise"], batch["timestep"], hidden, return_dict=False)[0]
    return predict_noise(
        controlnet,
        base.unet,
        noisy_latents=batch["noise"],
        timesteps=batch["timestep"],
        encoder_hidden_states=hidden,
        conditioning=make_conditioning(batch["image"], batch["mask"]),
    )


# ---- the base


def test_the_empty_prompt_is_encoded_once_for_each_place_it_computes_in() -> None:
    base = tiny.base()
    empty = tokenize(base.tokenizer, "")
    calls: list[int] = []
    base.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        kept = base.encode_prompt(empty.expand(3, -1), is_empty=True)
    assert len(calls) == 1
    assert kept.is_contiguous()
    assert torch.equal(kept[:1], base.encode_prompt(empty[None]))
    torch.testing.assert_close(kept, base.encode_prompt(empty.expand(3, -1)))
    base.to(torch.device("cpu"), dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert base.encode_prompt(empty[None], is_empty=True).dtype == torch.bfloat16


def test_the_vae_is_moved_within_a_validation_to_be_trained_with_later() -> None:
    base = tiny.base()
    with torch.inference_mode():
        base.move_vae(torch.device("meta"))
    assert not any(parameter.is_inference() for parameter in base.vae.parameters())


def test_what_computes_takes_the_kernels_that_are_fastest(base) -> None:
    for network in (base.vae, base.unet, build_controlnet(base.unet, stride=8)):
        layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
        assert layers
        assert {type(layer) for layer in layers} == {WinogradConv2d}


# ---- the ControlNet


def test_a_new_controlnet_leaves_the_frozen_unet_bit_for_bit_as_it_is(base) -> None:
    batch = tiny.batch(base)
    with torch.no_grad():
        steered = run(base, tiny.controlnet(base), batch)
        assert torch.equal(steered, run(base, None, batch, with_controlnet=False))


def test_a_trained_controlnet_reads_the_conditioning(base) -> None:
    controlnet = tiny.controlnet(base, zero_convolutions_at=0.1)
    hint = controlnet.controlnet_cond_embedding.conv_out
    torch.nn.init.normal_(hint.weight, std=0.1)
    batch = tiny.batch(base)
    with torch.no_grad():
        before = run(base, controlnet, batch)
        batch["mask"] = torch.roll(batch["mask"], 16, dims=-1)
        assert not torch.equal(before, run(base, controlnet, batch))


def test_the_new_controlnet_is_the_unets_encoder(base) -> None:
    controlnet = tiny.controlnet(base).state_dict()
    encoder = {
        name: tensor
        for name, tensor in base.unet.state_dict().items()
        if name.startswith(("conv_in", "time_embedding", "down_blocks", "mid_block"))
    }
    assert all(torch.equal(controlnet[name], tensor) for name, tensor in encoder.items())
    added = controlnet.keys() - encoder.keys()
    assert {name.split(".")[0] for name in added} == {
        "controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block",
    }  # fmt: skip


def test_only_the_controlnet_gets_gradients(base) -> None:
    controlnet = tiny.controlnet(base, zero_convolutions_at=0.1)
    # The hint's last convolution starts at zero too: nothing before it would learn at once.
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.1)
    run(base, controlnet, tiny.batch(base)).square().mean().backward()
    without = [n for n, p in controlnet.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    for name in NETWORKS:
        network = getattr(base, name)
        assert not network.training
        assert all(not p.requires_grad and p.grad is None for p in network.parameters()), name


@pytest.mark.parametrize(
    ("stride", "channels"),
    [(4, (16, 32, 96)), (8, (16, 32, 96, 256)), (16, (16, 32, 96, 256, 256))],
)
def test_the_hint_encoder_shrinks_the_conditioning_by_the_vaes_stride(stride, channels) -> None:
    base = tiny.base(stride=stride)
    controlnet = build_controlnet(base.unet, stride=stride)
    assert tuple(controlnet.config["conditioning_embedding_out_channels"]) == channels
    hint = controlnet.controlnet_cond_embedding(torch.zeros(1, 3, 64, 64))
    side = 64 // stride
    assert hint.shape == (1, base.unet.config["block_out_channels"][0], side, side)
    with torch.no_grad():
        assert run(base, controlnet, tiny.batch(base)).shape == (2, 4, side, side)


def test_a_controlnet_of_a_half_precision_base_is_trained_in_fp32() -> None:
    base = load_base(str(tiny.base_folder()), dtype=torch.bfloat16)
    assert {base.unet.dtype, base.text_encoder.dtype} == {torch.bfloat16}
    assert base.vae.dtype == torch.float32
    controlnet = build_controlnet(base.unet, stride=8)
    assert {p.dtype for p in controlnet.parameters()} == {torch.float32}
    assert controlnet.training


def test_controlnet_weights_come_back_as_they_were_saved(base) -> None:
    saved = tiny.controlnet(base, zero_convolutions_at=0.1).state_dict()
    controlnet = build_controlnet(base.unet, stride=8)
    load_controlnet_weights(controlnet, saved, source="a.pth")
    assert all(torch.equal(t, saved[name]) for name, t in controlnet.state_dict().items())


def test_controlnet_weights_that_dont_fit_are_refused_by_name(base) -> None:
    controlnet = tiny.controlnet(base)
    before = {name: tensor.clone() for name, tensor in controlnet.state_dict().items()}
    weights = {name: tensor + 1 for name, tensor in before.items()}
    del weights["conv_in.bias"]
    weights["extra"] = torch.zeros(1)
    weights["conv_in.weight"] = torch.zeros(16, 9, 3, 3)
    with pytest.raises(ValueError, match=r"old\.pth must hold a ControlNet for this base") as error:
        load_controlnet_weights(controlnet, weights, source="old.pth")
    line = str(error.value)
    assert "\n" not in line, line
    assert "1 missing: conv_in.bias" in line
    assert "1 unexpected: extra" in line
    assert "conv_in.weight (16, 9, 3, 3) instead of (16, 4, 3, 3)" in line
    assert all(torch.equal(t, before[n]) for n, t in controlnet.state_dict().items())


# ---- the base


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_auto_takes_the_schedulers_prediction_type(prediction_type: str) -> None:
    folder = tiny.base_folder(prediction_type=prediction_type)
    assert load_base(str(folder)).prediction_type == prediction_type


def test_a_named_prediction_type_overrules_the_scheduler() -> None:
    base = load_base(str(tiny.base_folder()), prediction_type="v_prediction")
    assert base.prediction_type == "v_prediction"
    assert base.config.prediction_type == "epsilon"


def test_the_training_schedule_is_stable_diffusions(base) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    torch.testing.assert_close(base.noise_scheduler.alphas_cumprod, alphas, rtol=1e-6, atol=0)


def test_latents_are_a_scaled_draw_from_the_posterior(base) -> None:
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    noise = torch.randn(2, 4, 8, 8)
    moments = base.vae.encode(image).latent_dist
    latents = base.sample_latents(base.encode_image(image), posterior_noise=noise)
    torch.testing.assert_close(latents, 0.18215 * (moments.mean + moments.std * noise))
    assert not latents.requires_grad


def test_a_wide_single_file_must_name_its_prediction_type(folder, tmp_path) -> None:
    for part, key in (("unet", "cross_attention_dim"), ("text_encoder", "hidden_size")):
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: 1024}))
    (tmp_path / "sd2.safetensors").write_bytes(b"not read before the refusal")
    with pytest.raises(ValueError, match=r"--prediction_type must be named .*768 px: v_prediction"):
        load_base(str(tmp_path / "sd2.safetensors"), base_config=str(folder))
    config = read_base_config(str(tmp_path / "sd2.safetensors"), base_config=str(folder))
    check_prediction_type(config, "epsilon")
    check_prediction_type(read_base_config(str(folder)), "auto")


# ---- the sizes of the real thing


def sizes_of(
    folder: Path, *, precision: str = "32", has_average: bool = False, use_8bit_adam: bool = False
) -> dict[str, float]:
    return estimate_sizes(
        read_base_config(str(folder)), precision=precision, has_average=has_average,
        use_8bit_adam=use_8bit_adam,
    )  # fmt: skip


@pytest.mark.skipif(not SD15_CONFIGS.is_dir(), reason="needs SD 1.5's configurations")
def test_adam_in_8_bits_saves_three_quarters_of_its_moments() -> None:
    """2.69 GiB -> 0.68: a byte a number, and a float32 for 256 of them."""
    for has_average in (False, True):
        full, small = (
            sizes_of(SD15_CONFIGS, has_average=has_average, use_8bit_adam=use_8bit_adam)
            for use_8bit_adam in (False, True)
        )
        for name in ("weights_gib", "checkpoint_gib"):
            assert full[name] - small[name] == pytest.approx(2.0084, abs=1e-3), name


@pytest.mark.skipif(not SD15_CONFIGS.is_dir(), reason="needs SD 1.5's configurations")
def test_sd15s_controlnet_has_the_parameters_of_the_real_one() -> None:
    sizes = sizes_of(SD15_CONFIGS)
    assert sizes["controlnet_parameters"] == 361_279_120
    # 859.5 M + 83.7 M + 123.1 M frozen, and four copies of 361.3 M trained, in fp32.
    assert sizes["weights_gib"] == pytest.approx((1066.2e6 + 4 * 361.279e6) * 4 / 2**30, rel=1e-3)
    assert sizes["checkpoint_gib"] == pytest.approx(3 * 361_279_120 * 4 / 2**30)


@pytest.mark.skipif(not SD15_CONFIGS.is_dir(), reason="needs SD 1.5's configurations")
def test_half_precision_halves_the_frozen_networks_alone() -> None:
    full = sizes_of(SD15_CONFIGS, has_average=True)
    half = sizes_of(SD15_CONFIGS, precision="bf16-mixed", has_average=True)
    frozen = 859_520_964 + 83_653_863 + 123_060_480
    assert full["weights_gib"] - half["weights_gib"] == pytest.approx(frozen * 2 / 2**30)
    assert full["checkpoint_gib"] == half["checkpoint_gib"]


@pytest.mark.skipif(not SD21_CONFIGS.is_dir(), reason="needs SD 2.1's configurations")
def test_sd21_is_understood_from_its_configuration() -> None:
    config = read_base_config(str(SD21_CONFIGS))
    assert (config.image_size, config.prediction_type) == (512, "epsilon")
    sizes = sizes_of(SD21_CONFIGS)
    assert 3.6e8 < sizes["controlnet_parameters"] < 3.7e8
