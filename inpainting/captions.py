"""The prompt of a sample: which words, and how they become the text encoder's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


def choose_prompt(
    rng: np.random.Generator,
    *,
    captions: Sequence[str],
    category_names: Sequence[str],
    empty_prompt_prob: float,
) -> str:
    """Choose the prompt that one picture is trained with this time.

    Empty prompts teach the network to read the picture itself, and classifier-free guidance needs
    them. Without captions the names of the objects stand in CLIP's own template, which describes a
    photograph better than bare names do; they come without article or plural, since a name says
    neither how many there are nor which article it takes.

    Args:
        rng: the sample's generator for its prompt.
        captions: the picture's captions.
        category_names: what the picture shows, the most important first.
        empty_prompt_prob: share of the samples that get no words, in [0, 1].

    Returns:
        "", one of the captions, or "a photo of dog, person and bench".

    Source: 50 % empty prompts: Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion
        Models", section 3.3. The template: Radford et al., "Learning Transferable Visual Models
        From Natural Language Supervision", section 3.1.4.
    """
    if rng.random() < empty_prompt_prob:
        return ""
    if captions:
        return captions[int(rng.integers(len(captions)))]
    if not category_names:
        return ""
    *others, last = category_names
    return f"a photo of {', '.join(others)} and {last}" if others else f"a photo of {last}"


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Turn a prompt into the text encoder's tokens.

    Args:
        tokenizer: the base's own.
        prompt: any text; special tokens that it spells out are taken as plain words, so that a
            caption cannot end the prompt early.

    Returns:
        (model_max_length,) int64, cut off or padded.
    """
    tokens = tokenizer(
        prompt,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        split_special_tokens=True,
    )
    return torch.tensor(tokens["input_ids"], dtype=torch.int64)
