"""CocoInpaintingDataset: one COCO record -> one Sample, the contract between data and model.

A sample brings everything that the training step needs, its random numbers too: the step itself
draws nothing. Each number is addressed by (seed, epoch, image id), see inpainting/randomness.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NotRequired, TypedDict

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from inpainting.captions import choose_prompt, tokenize
from inpainting.coco import CocoIndex, Rle
from inpainting.images import crop_box, open_image, resize_image, resize_mask
from inpainting.latents import NO_SLOT, MomentsCache, Slot, tag_pixels
from inpainting.masks import draw_mask
from inpainting.randomness import generator

logger = logging.getLogger(__name__)

# Validation asks the same questions in every run, whatever --seed: runs can be compared.
VALIDATION_SEED = 20_230_210
# Runs with different seeds cut the same crops, in another order: they can share a cache.
CROP_SEED = VALIDATION_SEED
CENTRE_VIEW = 0


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
        moments: (2C, h, w) float16, what the VAE's encoder says of the image, from the cache; zeros
            where it must still be asked. Only with a cache, like the next one.
        slot: (3,) int64, the Slot that waits for the moments; NO_SLOT where they are there.
    """

    image: Tensor
    mask: Tensor
    input_ids: Tensor
    timestep: Tensor
    noise: Tensor
    posterior_noise: Tensor
    image_id: Tensor
    prompt: str
    moments: NotRequired[Tensor]
    slot: NotRequired[Tensor]


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
        num_crops: squares that a picture has for ever, each as it is and mirrored; an epoch draws
            one. Few, so that the VAE need encode each only once.
        seed: the run's seed.
    """

    image_size: int
    latent_shape: tuple[int, int, int]
    num_train_timesteps: int
    mask_types: Mapping[str, float]
    mask_area_range: tuple[float, float]
    empty_prompt_prob: float
    num_crops: int
    seed: int

    @property
    def views(self) -> range:
        """The views that training cuts: each crop, then its mirror image."""
        return range(CENTRE_VIEW + 1, CENTRE_VIEW + 1 + 2 * self.num_crops)


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
        is_training: crop, flip and prompt drop drawn anew each epoch; otherwise fixed.
        moments_cache: where the VAE's moments are kept, or None for samples without.
    """

    def __init__(
        self,
        index: CocoIndex,
        *,
        rows: Sequence[int] | np.ndarray,
        tokenizer: CLIPTokenizer,
        rule: SampleRule,
        is_training: bool,
        moments_cache: MomentsCache | None,
    ) -> None:
        self.index = index
        self.rows = np.asarray(rows, dtype=np.int64)
        self.tokenizer = tokenizer
        self.rule = rule
        self.is_training = is_training
        self.moments_cache = moments_cache
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

        view = CENTRE_VIEW
        if self.is_training:
            crop = int(address("crop", epoch, image_id).integers(rule.num_crops))
            view = rule.views[2 * crop + int(address("flip", epoch, image_id).random() < 0.5)]
        picture = open_picture(self.index, row)
        box, flip = place_view(view, picture=picture, image_id=image_id)

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
        sample = Sample(
            image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            mask=torch.from_numpy(mask)[None],
            input_ids=tokenize(self.tokenizer, prompt),
            timestep=torch.tensor(timestep),
            noise=torch.from_numpy(noise[0]),
            posterior_noise=torch.from_numpy(noise[1]),
            image_id=torch.tensor(image_id),
            prompt=prompt,
        )
        if self.moments_cache is not None:
            sample["moments"], sample["slot"] = _read_moments(
                self.moments_cache, row=row, view=view, image=image
            )
        return sample


def open_picture(index: CocoIndex, row: int) -> Image:
    """Open a row's picture, a loaded PIL image of mode RGB.

    Raises:
        FileNotFoundError, ValueError: it can't be read, or isn't the one of its record.
    """
    path = index.image_path(row)
    picture = open_image(path)
    height, width = index.size(row)
    if height and (width, height) != picture.size:
        raise ValueError(
            f"{path} must be {width} x {height} px as its record says, "
            f"got {picture.size[0]} x {picture.size[1]}: its masks don't belong to it."
        )
    return picture


def place_view(view: int, *, picture: Image, image_id: int) -> tuple[tuple[int, int, int], bool]:
    """Return where a view lies in its picture: the box, and whether it is mirrored.

    View 0 is the square in the middle, which validates; 1 and 2 are the first crop and its mirror
    image, 3 and 4 the second, and so on.
    """
    if view == CENTRE_VIEW:
        return crop_box(*picture.size, rng=None), False
    crop, is_mirrored = divmod(view - CENTRE_VIEW - 1, 2)
    rng = generator(CROP_SEED, "crop", crop, image_id)
    return crop_box(*picture.size, rng=rng), bool(is_mirrored)


def _read_moments(
    cache: MomentsCache, *, row: int, view: int, image: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Return a Sample's moments and slot."""
    slot = cache.slot(row, view=view, tag=tag_pixels(image))
    moments = cache.read(slot)
    if moments is None:
        return torch.zeros(cache.moments_shape, dtype=torch.float16), torch.tensor(slot)
    return torch.from_numpy(moments), torch.tensor(NO_SLOT)


class MissingViews(Dataset[list[tuple[Slot, Tensor]]]):
    """What a MomentsCache lacks of a training's pictures, for tools.cache_latents.

    Each item is one picture's missing views, as slots and (3, H, W) uint8 pictures; a picture that
    can't be read has none, and is named.

    Args:
        index: the COCO records.
        train_rows: the rows that train: all their crops are looked up.
        val_rows: the rows that validate: their centres are.
        rule: what a sample looks like.
        cache: what is filled.
    """

    def __init__(
        self,
        index: CocoIndex,
        *,
        train_rows: np.ndarray,
        val_rows: np.ndarray,
        rule: SampleRule,
        cache: MomentsCache,
    ) -> None:
        self.index = index
        self.rows = np.concatenate([train_rows, val_rows])
        self.num_train = len(train_rows)
        self.rule = rule
        self.cache = cache

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> list[tuple[Slot, Tensor]]:
        row = int(self.rows[position])
        try:
            picture = open_picture(self.index, row)
        except (ValueError, OSError) as error:
            logger.warning("left out: %s", error)
            return []
        image_id, missing = int(self.index.image_ids[row]), []
        for view in self.rule.views if position < self.num_train else (CENTRE_VIEW,):
            box, flip = place_view(view, picture=picture, image_id=image_id)
            image = resize_image(picture, box=box, size=self.rule.image_size, flip=flip)
            slot = self.cache.slot(row, view=view, tag=tag_pixels(image))
            if self.cache.read(slot) is None:
                missing.append((slot, torch.from_numpy(image).permute(2, 0, 1).contiguous()))
        return missing
