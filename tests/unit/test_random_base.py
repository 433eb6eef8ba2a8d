from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTokenizer

from demo.random_base import learn_merges, write_byte_tokenizer, write_random_base


@pytest.mark.parametrize("stride", [4, 8])
def test_pipeline_loads_without_a_warning_and_draws_at_the_declared_size(
    tmp_path: Path, stride: int, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_random_base(tmp_path, stride=stride)
    diffusers_logging.set_verbosity_warning()
    diffusers_logging.disable_progress_bar()
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of whatever ran before
        pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    said = capfd.readouterr()
    assert "warn" not in (said.out + said.err).lower()
    assert "not expected" not in said.err
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red house", num_inference_steps=1, return_dict=False)[0][0]
    assert image.size == (64, 64)
    assert pipeline.vae_scale_factor == stride


def test_configurations_are_stable_diffusions(tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        write_random_base(tmp_path, prediction_type="v_prediction")
    )
    schedule = pipeline.scheduler.config
    assert (schedule.beta_start, schedule.beta_end) == (0.00085, 0.012)
    assert schedule.beta_schedule == "scaled_linear"
    assert schedule.prediction_type == "v_prediction"
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size
    assert pipeline.safety_checker is None


def test_tokenizer_spells_any_text_and_pads_to_77(tmp_path: Path) -> None:
    tokenizer = StableDiffusionPipeline.from_pretrained(write_random_base(tmp_path)).tokenizer
    assert len(tokenizer) == 514
    ids = tokenizer("Ünï dog 狗", padding="max_length", truncation=True).input_ids
    assert len(ids) == 77
    assert ids[0] == 512
    assert ids[-1] == 513
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "ünï dog 狗"


def test_text_encoder_reads_the_end_of_the_prompt(tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(write_random_base(tmp_path))
    ids = pipeline.tokenizer("dog", padding="max_length", return_tensors="pt").input_ids
    output = pipeline.text_encoder(ids)
    first_end = int((ids[0] == 513).nonzero()[0])
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, first_end])


def test_same_seed_writes_the_same_bytes_and_spares_the_global_generator(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (write_random_base(tmp_path / name, seed=3) for name in ("a", "b"))
    other = write_random_base(tmp_path / "c", seed=4)
    assert torch.equal(torch.rand(3), expected)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    weights = Path("unet/diffusion_pytorch_model.safetensors")
    assert (first / weights).read_bytes() != (other / weights).read_bytes()
    assert sum((first / name).stat().st_size for name in files) < 2_000_000


def test_nine_channel_unet_can_be_asked_for(tmp_path: Path) -> None:
    folder = write_random_base(tmp_path, in_channels=9)
    unet = StableDiffusionPipeline.from_pretrained(folder).unet
    assert unet.config.in_channels == 9
    assert ControlNetModel.from_unet(unet).config["in_channels"] == 9


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stride must be a power of 2, got 6"):
        write_random_base(tmp_path, stride=6)
    with pytest.raises(ValueError, match=r"image_size must be a multiple of 8 .*, got 60"):
        write_random_base(tmp_path, image_size=60)


def test_learnt_merges_spell_frequent_words_in_one_token(tmp_path: Path) -> None:
    texts = ["a red house by the lake", "Two red houses, one lake"] * 10
    write_byte_tokenizer(tmp_path, merges=learn_merges(texts))
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("red house, lake") == ["red</w>", "house</w>", ",</w>", "lake</w>"]
    assert tokenizer.decode(tokenizer("a rude 狗").input_ids[1:-1]).strip() == "a rude 狗"
    assert len(learn_merges(texts, num_merges=3)) == 3
