"""CocoInpaintingDataset: one COCO record -> one Sample, the contract between data and model.

A sample brings everything that the training step needs, its random numbers too: the step itself
draws nothing. Each number is addressed by (seed, epoch, image id), see inpainting/randomness.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NotRequired, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPTokenizer

from inpainting.captions import choose_prompt, tokenize
from inpainting.coco import CocoIndex, Rle
from inpainting.images import crop_box, resize_image, resize_mask
from inpainting.latents import NO_SLOT, MomentsCache, Slot, tag_pixels
from inpainting.masks import draw_mask
from inpainting.randomness import generator
from inpainting.unreadable import UnreadablePictureError, UnreadablePictures

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


@dataclass(frozen=True)
class Cut:
    """One picture as it is trained on.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, 1 = hole to fill.
        prompt: in words, "" where it was dropped.
        view: which of the picture's views it is, see `place_view`.
    """

    image: np.ndarray
    mask: np.ndarray
    prompt: str
    view: int


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
        unreadable: what this and other datasets have found.
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
        unreadable: UnreadablePictures,
    ) -> None:
        self.index = index
        self.rows = np.asarray(rows, dtype=np.int64)
        self.tokenizer = tokenizer
        self.rule = rule
        self.is_training = is_training
        self.moments_cache = moments_cache
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, address: tuple[int, int]) -> Sample:
        """Return the sample at (epoch, position).

        A picture that can't be read is replaced by the next one in the split that can. Which one
        that is depends on the files alone, not on who looks, or when: it is the same one in every
        loader process, on every rank and after a resume.

        Raises:
            UnreadablePictureError: not one picture of the split can be read, or none may be left
                out.
            OSError: the machine is out of files or memory.
        """
        epoch, position = address
        for offset in range(len(self)):
            row = int(self.rows[(position + offset) % len(self)])
            picture = self.unreadable.open_picture(self.index, row)
            if picture is not None:
                return self._build_sample(row, picture=picture, epoch=epoch)
        raise UnreadablePictureError(
            "at least one picture must be readable, got none: see the lines above."
        )

    def _build_sample(self, row: int, *, picture: Image.Image, epoch: int) -> Sample:
        rule = self.rule
        cut = cut_picture(
            self.index, row, picture=picture, rule=rule, epoch=epoch, is_training=self.is_training
        )
        image_id = int(self.index.image_ids[row])
        rng = _address(rule, is_training=self.is_training)("noise", epoch, image_id)
        timestep = rng.integers(rule.num_train_timesteps)
        noise = rng.standard_normal((2, *rule.latent_shape), dtype=np.float32)
        sample = Sample(
            image=torch.from_numpy(cut.image).permute(2, 0, 1).contiguous(),
            mask=torch.from_numpy(cut.mask)[None],
            input_ids=tokenize(self.tokenizer, cut.prompt),
            timestep=torch.tensor(timestep),
            noise=torch.from_numpy(noise[0]),
            posterior_noise=torch.from_numpy(noise[1]),
            image_id=torch.tensor(image_id),
            prompt=cut.prompt,
        )
        if self.moments_cache is not None:
            sample["moments"], sample["slot"] = _read_moments(
                self.moments_cache, row=row, view=cut.view, image=cut.image
            )
        return sample


def cut_picture(
    index: CocoIndex,
    row: int,
    *,
    picture: Image.Image,
    rule: SampleRule,
    epoch: int,
    is_training: bool,
) -> Cut:
    """Cut a picture and its hole, and choose its prompt.

    Args:
        index: the COCO records.
        row: the picture's.
        picture: as `CocoIndex.open_picture` returns it.
        rule: what a sample looks like.
        epoch: of the run; validation is the same in all of them.
        is_training: crop, flip and prompt drop are drawn; otherwise the centre, as it is.
    """
    size, address = rule.image_size, _address(rule, is_training=is_training)
    image_id = int(index.image_ids[row])
    view = CENTRE_VIEW
    if is_training:
        crop = int(address("crop", epoch, image_id).integers(rule.num_crops))
        view = rule.views[2 * crop + int(address("flip", epoch, image_id).random() < 0.5)]
    box, flip = place_view(view, picture=picture, image_id=image_id)

    def cut_mask(rle: Rle) -> np.ndarray:
        return resize_mask(index.decode(rle), box=box, size=size, flip=flip)

    mask = draw_mask(
        address("mask", epoch, image_id),
        size=size,
        mask_types=rule.mask_types,
        area_range=rule.mask_area_range,
        object_masks=[partial(cut_mask, rle) for rle in index.object_masks(row)],
    )
    prompt = choose_prompt(
        address("prompt", epoch, image_id),
        captions=index.captions(row),
        category_names=index.category_names(row),
        empty_prompt_prob=rule.empty_prompt_prob if is_training else 0.0,
    )
    image = resize_image(picture, box=box, size=size, flip=flip)
    return Cut(image, mask, prompt, view)


def place_view(
    view: int, *, picture: Image.Image, image_id: int
) -> tuple[tuple[int, int, int], bool]:
    """Return where a view lies in its picture: the box, and whether it is mirrored.

    View 0 is the square in the middle, which validates; 1 and 2 are the first crop and its mirror
    image, 3 and 4 the second, and so on.
    """
    if view == CENTRE_VIEW:
        return crop_box(*picture.size, rng=None), False
    crop, is_mirrored = divmod(view - CENTRE_VIEW - 1, 2)
    rng = generator(CROP_SEED, "crop", crop, image_id)
    return crop_box(*picture.size, rng=rng), bool(is_mirrored)


def _address(rule: SampleRule, *, is_training: bool) -> Callable[..., np.random.Generator]:
    """Return what makes a sample's generators; validation knows neither seed nor epoch."""
    if is_training:
        return partial(generator, rule.seed)
    return lambda purpose, _, image_id: generator(VALIDATION_SEED, purpose, 0, image_id)


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
    can't be read has none.

    Args:
        index: the COCO records.
        train_rows: the rows that train: all their crops are looked up.
        val_rows: the rows that validate: their centres are.
        rule: what a sample looks like.
        cache: what is filled.
        unreadable: what was found at the start.
    """

    def __init__(
        self,
        index: CocoIndex,
        *,
        train_rows: np.ndarray,
        val_rows: np.ndarray,
        rule: SampleRule,
        cache: MomentsCache,
        unreadable: UnreadablePictures,
    ) -> None:
        self.index = index
        self.rows = np.concatenate([train_rows, val_rows])
        self.num_train = len(train_rows)
        self.rule = rule
        self.cache = cache
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> list[tuple[Slot, Tensor]]:
        row = int(self.rows[position])
        picture = self.unreadable.open_picture(self.index, row)
        if picture is None:
            return []
        image_id, missing = int(self.index.image_ids[row]), []
        for view in self.rule.views if position < self.num_train else (CENTRE_VIEW,):
            box, flip = place_view(view, picture=picture, image_id=image_id)
            image = resize_image(picture, box=box, size=self.rule.image_size, flip=flip)
            slot = self.cache.slot(row, view=view, tag=tag_pixels(image))
            if self.cache.read(slot) is None:
                missing.append((slot, torch.from_numpy(image).permute(2, 0, 1).contiguous()))
        return missing
