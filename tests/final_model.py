"""What a final_model folder is made of, small: a record, and a ControlNet of random_base's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from inpainting.record import InpaintingRecord

HINTS = {4: (16, 32, 96), 8: (16, 32, 96, 256)}


def make_record(**changes: object) -> InpaintingRecord:
    record = InpaintingRecord(
        image_size=64,
        vae_stride=8,
        prediction_type="epsilon",
        base="my-base",
        base_unet_sha256="0123456789abcdef",
        is_average=False,
        global_step=1234,
    )
    return dataclasses.replace(record, **changes)


def load_unet(base: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(str(base), subfolder="unet")


def make_controlnet(base: Path, *, stride: int = 8) -> ControlNetModel:
    torch.manual_seed(0)
    return ControlNetModel.from_unet(
        load_unet(base), conditioning_embedding_out_channels=HINTS[stride]
    )
