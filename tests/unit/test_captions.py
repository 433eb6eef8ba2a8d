"""Prompts: drawn from the sample's generator, and always of the text encoder's length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from inpainting.captions import choose_prompt, tokenize

CAPTIONS = ["A dog on a bench.", "A man with his dog.", "A park."]
NAMES = ["dog", "person", "bench"]


def draw(
    num: int,
    *,
    captions: list[str] = CAPTIONS,
    category_names: list[str] = NAMES,
    empty_prompt_prob: float = 0.0,
) -> Counter[str]:
    rng = np.random.default_rng(0)
    return Counter(
        choose_prompt(
            rng,
            captions=captions,
            category_names=category_names,
            empty_prompt_prob=empty_prompt_prob,
        )
        for _ in range(num)
    )


def test_each_caption_is_drawn_equally_often() -> None:
    drawn = draw(6000)
    assert drawn.keys() == set(CAPTIONS)
    assert all(1800 < times < 2200 for times in drawn.values()), drawn


@pytest.mark.parametrize(
    ("names", "prompt"),
    [
        (["dog"], "a photo of dog"),
        (["dog", "person"], "a photo of dog and person"),
        (["dog", "person", "bench"], "a photo of dog, person and bench"),
        ([], ""),
    ],
)
def test_without_captions_the_prompt_names_what_is_there(names: list[str], prompt: str) -> None:
    assert draw(3, captions=[], category_names=names) == {prompt: 3}


@pytest.mark.parametrize("captions", [CAPTIONS, []])
def test_prompts_are_empty_as_often_as_asked_for(captions: list[str]) -> None:
    assert 4800 < draw(10_000, captions=captions, empty_prompt_prob=0.5)[""] < 5200
    assert draw(100, captions=captions, empty_prompt_prob=1.0) == {"": 100}
    assert draw(100, captions=captions, empty_prompt_prob=0.0)[""] == 0


def test_the_same_generator_draws_the_same_prompt() -> None:
    assert draw(50, empty_prompt_prob=0.5) == draw(50, empty_prompt_prob=0.5)


def byte_tokenizer() -> CLIPTokenizer:
    """A real CLIP tokenizer that knows single bytes only."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


@pytest.mark.parametrize("prompt", ["", "a dog", "dog " * 500, "空の部屋 \U0001f600", "\x00\n\t"])
def test_every_prompt_has_the_text_encoders_length(prompt: str) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenize(tokenizer, prompt)
    assert tokens.shape == (77,)
    assert tokens.dtype == torch.int64
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens[-1] == tokenizer.eos_token_id


def test_tokens_equal_those_of_the_pipeline() -> None:
    tokenizer = byte_tokenizer()
    expected = tokenizer(
        "a photo of dog",
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids[0]
    assert torch.equal(tokenize(tokenizer, "a photo of dog"), expected)


def test_a_caption_cannot_end_the_prompt_early() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenize(tokenizer, "a<|endoftext|>b").tolist()
    words = tokens[1 : tokens.index(tokenizer.eos_token_id)]
    assert len(words) > 10, tokenizer.decode(words)


def test_stable_diffusions_own_tokenizer_is_understood() -> None:
    folder = Path(__file__).parents[2].parent / "shared" / "weights" / "clip_tokenizer"
    if not folder.exists():
        pytest.skip("the real tokenizer is not here")
    tokens = tokenize(CLIPTokenizer.from_pretrained(folder), "a photo of dog, person and bench")
    assert tokens[:10].tolist() == [49406, 320, 1125, 539, 1929, 267, 2533, 537, 8771, 49407]
    assert (tokens[10:] == 49407).all()
