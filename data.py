"""CocoInpaintingDataset: one COCO record -> one Sample, the contract between data and model.

A sample brings everything that the training step needs, its random numbers too: the step itself
draws nothing. Each number is addressed by (seed, epoch, image id), see inpainting/randomness.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from inpainting.captions import choose_prompt, tokenize
from inpainting.coco import CocoIndex, Rle
from inpainting.images import crop_box, open_image, resize_image, resize_mask
from inpainting.masks import draw_mask
from inpainting.randomness import generator

logger = logging.getLogger(__name__)

# Validation asks the same questions in every run, whatever --seed: runs can be compared.
VALIDATION_SEED = 20_230_210


class Sample(TypedDict):
    """One training sample; a batch stacks each entry along a new first dimension.

    Attributes:
        image: (3, H, W) uint8 [0, 255], RGB.
        mask: (1, H, W) uint8, 1 = hole to fill.
        input_ids: (L,) int64, the tokenized prompt.
        timestep: () int64 in [0, num_train_timesteps).
        noise: (C, h, w) float32, standard normal: what the UNet is to predict.
        posterior_noise: (C, h, w) float32, standard normal: the draw from the VAE's posterior.
        image_id: () int64.
        prompt: the prompt in words, "" where it was dropped.
    """

    image: Tensor
    mask: Tensor
    input_ids: Tensor
    timestep: Tensor
    noise: Tensor
    posterior_noise: Tensor
    image_id: Tensor
    prompt: str


@dataclass(frozen=True)
class SampleRule:
    """What a sample looks like, apart from the picture it is cut from.

    Attributes:
        image_size: side of the square sample in pixels, a multiple of the VAE's stride.
        latent_shape: (C, h, w) of its latents.
        num_train_timesteps: length of the noise schedule.
        mask_types: share of each mask type, summing to 1.
        mask_area_range: least and largest share of the picture that is hole.
        empty_prompt_prob: probability that a training prompt is dropped.
        seed: the run's seed.
    """

    image_size: int
    latent_shape: tuple[int, int, int]
    num_train_timesteps: int
    mask_types: Mapping[str, float]
    mask_area_range: tuple[float, float]
    empty_prompt_prob: float
    seed: int


class CocoInpaintingDataset(Dataset[Sample]):
    """Pictures of a CocoIndex with a hole, a prompt and the step's random numbers.

    Indexed by (epoch, position), so that loader workers need not be told the epoch. Validation
    samples are cut from the centre, not flipped, keep their prompt, and are the same at every
    epoch of every run.

    Args:
        index: the COCO records.
        rows: (N,) the index's rows that belong to this split.
        tokenizer: the base's.
        rule: what a sample looks like.
        is_training: random crop, flip and prompt drop, fresh each epoch; otherwise fixed.
    """

    def __init__(
        self,
        index: CocoIndex,
        *,
        rows: Sequence[int] | np.ndarray,
        tokenizer: CLIPTokenizer,
        rule: SampleRule,
        is_training: bool,
    ) -> None:
        self.index = index
        self.rows = np.asarray(rows, dtype=np.int64)
        self.tokenizer = tokenizer
        self.rule = rule
        self.is_training = is_training
        self._is_unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, address: tuple[int, int]) -> Sample:
        """Return the sample at (epoch, position).

        A picture that can't be read is replaced by the next one in the split, which is the same
        one in every run, and is named once: one bad row must not end days of training.

        Raises:
            ValueError: not one picture of the split can be read.
        """
        epoch, position = address
        for offset in range(len(self)):
            row = int(self.rows[(position + offset) % len(self)])
            if row in self._is_unreadable:
                continue
            try:
                return self._build_sample(row, epoch=epoch)
            except (ValueError, OSError) as error:
                self._is_unreadable.add(row)
                logger.warning("left out: %s", error)
        raise ValueError("at least one picture must be readable, got none: see the lines above.")

    def _build_sample(self, row: int, *, epoch: int) -> Sample:
        rule, size = self.rule, self.rule.image_size
        image_id = int(self.index.image_ids[row])
        if self.is_training:
            address = partial(generator, rule.seed)
        else:
            address, epoch = partial(generator, VALIDATION_SEED), 0

        picture = open_image(self.index.image_path(row))
        height, width = self.index.size(row)
        if height and (width, height) != picture.size:
            raise ValueError(
                f"{self.index.image_path(row)} must be {width} x {height} px as its record says, "
                f"got {picture.size[0]} x {picture.size[1]}: its masks don't belong to it."
            )
        box = crop_box(
            *picture.size, rng=address("crop", epoch, image_id) if self.is_training else None
        )
        flip = self.is_training and address("flip", epoch, image_id).random() < 0.5

        def cut_mask(rle: Rle) -> np.ndarray:
            return resize_mask(self.index.decode(rle), box=box, size=size, flip=flip)

        mask = draw_mask(
            address("mask", epoch, image_id),
            size=size,
            mask_types=rule.mask_types,
            area_range=rule.mask_area_range,
            object_masks=[partial(cut_mask, rle) for rle in self.index.object_masks(row)],
        )
        prompt = choose_prompt(
            address("prompt", epoch, image_id),
            captions=self.index.captions(row),
            category_names=self.index.category_names(row),
            empty_prompt_prob=rule.empty_prompt_prob if self.is_training else 0.0,
        )
        image = resize_image(picture, box=box, size=size, flip=flip)
        rng = address("noise", epoch, image_id)
        timestep = rng.integers(rule.num_train_timesteps)
        noise = rng.standard_normal((2, *rule.latent_shape), dtype=np.float32)
        return Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            mask=torch.from_numpy(mask)[None],
            input_ids=tokenize(self.tokenizer, prompt),
            timestep=torch.tensor(timestep),
            noise=torch.from_numpy(noise[0]),
            posterior_noise=torch.from_numpy(noise[1]),
            image_id=torch.tensor(image_id),
            prompt=prompt,
        )
