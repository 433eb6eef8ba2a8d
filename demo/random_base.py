"""A small base with random weights in Stable Diffusion's shape, made in a second.

Every part is the real class at a tiny size, in an ordinary diffusers folder, so that whatever runs
on SD 1.5 runs on this, offline and fast. It has learnt nothing: its pictures are noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel

BOS_TOKEN, EOS_TOKEN = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
NUM_MERGES = 1500
MAX_TOKENS = 77
TEXT_WIDTH = 32
# (library, class) of each part, as diffusers' model_index.json wants them.
PIPELINE_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_random_base(
    folder: str | Path,
    *,
    stride: int = 8,
    image_size: int = 64,
    prediction_type: str = "epsilon",
    in_channels: int = 4,
    seed: int = 0,
) -> Path:
    """Write a diffusers folder of about 1.5 MB; the same arguments write the same bytes.

    Args:
        folder: where to; made when missing.
        stride: pixels per latent along one side, a power of 2.
        image_size: the side in pixels that the UNet is declared for, a multiple of stride.
        prediction_type: "epsilon" or "v_prediction".
        in_channels: 4, or 9 for the inpainting UNet that a trainer has to refuse.
        seed: of the random weights. The caller's global generator isn't touched.

    Returns:
        The folder.

    Raises:
        ValueError: stride is no power of 2, or image_size no multiple of it.
    """
    if stride < 1 or stride & (stride - 1):
        raise ValueError(f"stride must be a power of 2, got {stride}. Stable Diffusion has 8.")
    if image_size < stride or image_size % stride:
        raise ValueError(
            f"image_size must be a multiple of {stride} (the stride), got {image_size}."
        )
    folder = Path(folder)
    vocabulary_size = write_byte_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _build_vae(num_blocks=stride.bit_length(), image_size=image_size).save_pretrained(
            folder / "vae"
        )
        _build_unet(in_channels=in_channels, sample_size=image_size // stride).save_pretrained(
            folder / "unet"
        )
        build_text_encoder(
            vocabulary_size, width=TEXT_WIDTH, mlp_width=2 * TEXT_WIDTH, num_layers=2
        ).save_pretrained(folder / "text_encoder")
    build_scheduler(prediction_type).save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", PIPELINE_INDEX)
    return folder


def write_byte_tokenizer(folder: Path, *, merges: Sequence[tuple[str, str]] = ()) -> int:
    """Write CLIP's tokenizer with a small vocabulary: 2 x 256 bytes, the merges, 2 special tokens.

    Each byte comes twice, as CLIP has it: within a word, and at a word's end ("</w>").

    Args:
        folder: where to; made when missing.
        merges: pairs of tokens that become one, the most frequent first. Without any every text is
            spelt out, so a prompt longer than 75 letters is cut.

    Returns:
        The number of tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters)]
    tokens += [*(first + second for first, second in merges), BOS_TOKEN, EOS_TOKEN]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special_tokens = {
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "unk_token": EOS_TOKEN,
    }
    write_json(folder / "special_tokens_map.json", special_tokens)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": MAX_TOKENS,
            "do_lower_case": True,
            **special_tokens,
        },
    )
    return len(tokens)


def learn_merges(texts: Iterable[str], *, num_merges: int = NUM_MERGES) -> list[tuple[str, str]]:
    """Learn which pairs of tokens texts join most often, by CLIP's rules.

    Args:
        texts: what to learn from.
        num_merges: at most so many; few different words make fewer.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=num_merges + 2 * len(pre_tokenizers.ByteLevel.alphabet()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in merges[:num_merges]]


def build_scheduler(prediction_type: str) -> PNDMScheduler:
    """Build Stable Diffusion 1.5's own schedule."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,  # pyright: ignore[reportArgumentType]
    )


def _build_vae(*, num_blocks: int, image_size: int) -> AutoencoderKL:
    # The suppressions: diffusers annotates any number of blocks as exactly one.
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, *[16] * (num_blocks - 1)),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * num_blocks,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * num_blocks,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=image_size,
        scaling_factor=0.18215,
    )


def _build_unet(*, in_channels: int, sample_size: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )


def build_text_encoder(
    vocabulary_size: int, *, width: int, mlp_width: int, num_layers: int
) -> CLIPTextModel:
    """Build an untrained text encoder of four heads; the last two tokens are CLIP's special ones.

    Args:
        vocabulary_size: number of tokens, the special ones too.
        width: of the hidden states, a multiple of 4.
        mlp_width: of the layer between the two of each perceptron.
        num_layers: how deep.
    """
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=width,
            intermediate_size=mlp_width,
            projection_dim=width,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=vocabulary_size - 2,
            eos_token_id=vocabulary_size - 1,
            pad_token_id=vocabulary_size - 1,
        )
    )


def write_json(path: Path, content: dict) -> None:
    """Write one of a base's configuration files."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
