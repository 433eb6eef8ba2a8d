"""From weights in any form to a pipeline that fills holes, with the base that they belong to.

What infer.py and the tools share. The weights' record says how they were trained; where it names no
place, the flags must.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from inpainting.checkpoints import base_hash, find_record
from inpainting.devices import choose_device, keep_freed_memory
from inpainting.diffusion import HOLE_VALUE
from inpainting.flags import DEFAULT_BASE
from inpainting.interop import read_controlnet_weights
from inpainting.record import InpaintingRecord
from inpainting.sampling import InpaintPipeline, make_pipeline, make_scheduler
from model import Base, build_controlnet, load_base, load_controlnet_weights

logger = logging.getLogger(__name__)

TEXT_READER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
DEFAULT_BASE_TEXT_WIDTH = 768  # Stable Diffusion 1.x; 2.x has 1024


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline that is ready to fill holes.

    Attributes:
        pipeline: base and ControlNet on their device.
        base: the frozen networks in it.
        image_size: the working size that was recorded, or the base's own, in pixels.
    """

    pipeline: InpaintPipeline
    base: Base
    image_size: int


def load_from_flags(args: argparse.Namespace, *, demo_base: Path) -> LoadedPipeline:
    """Load what the flags name that infer.py and tools.evaluate share; see `load_pipeline`.

    On a CPU the process keeps the memory that it frees from now on.
    """
    device, dtype = choose_device(args.device, precision=args.precision)
    keep_freed_memory(device.type)
    return load_pipeline(
        args.checkpoint_path,
        base=args.pretrained_model_name_or_path,
        base_config=args.base_config,
        prediction_type=args.prediction_type,
        scheduler=args.scheduler,
        device=device,
        dtype=dtype,
        demo_base=demo_base,
    )


def load_pipeline(
    checkpoint_path: str,
    *,
    base: str | None,
    base_config: str | None,
    prediction_type: str,
    scheduler: str,
    device: torch.device,
    dtype: torch.dtype,
    demo_base: Path,
) -> LoadedPipeline:
    """Load a ControlNet and its base.

    Args:
        checkpoint_path: controlnet.pth, final_model folder, Lightning .ckpt or single file.
        base: hub id, folder or file; None for the one that the weights record.
        base_config: folder or hub id of a single file's configurations.
        prediction_type: "auto" (what was recorded, or the scheduler's own), "epsilon" or
            "v_prediction".
        scheduler: a key of `inpainting.sampling.SCHEDULERS`.
        device: where to.
        dtype: of UNet and ControlNet.
        demo_base: the demo's, for weights that were trained on it.

    Raises:
        FileNotFoundError, ValueError: names the flag or file to correct.
    """
    weights = read_controlnet_weights(checkpoint_path)
    record = find_record(checkpoint_path)
    if base is None:
        base, recorded_config = find_base(
            checkpoint_path, weights=weights, record=record, demo_base=demo_base
        )
        base_config = base_config or recorded_config
    if prediction_type == "auto" and record is not None:
        prediction_type = record.prediction_type
    networks = load_base(base, base_config=base_config, prediction_type=prediction_type)
    controlnet = _build_controlnet(
        weights, record=record, networks=networks, source=checkpoint_path
    )
    # VAE and text encoder stay in float32: fp16 overflows in the first, and the second's dtype is
    # that of the latents between the steps.
    networks.place_vae(device, dtype=torch.float32)
    networks.text_encoder.to(device=device)  # type: ignore[arg-type]
    networks.unet.to(device=device, dtype=dtype)  # type: ignore[call-arg]
    controlnet.to(device=device, dtype=dtype)  # type: ignore[call-arg]
    sampler = make_scheduler(scheduler, networks.noise_scheduler)
    pipeline = _join(networks, controlnet, scheduler=sampler)
    return LoadedPipeline(pipeline, networks, (record or networks).image_size)


def _join(networks: Base, controlnet: ControlNetModel, *, scheduler: Any) -> InpaintPipeline:
    return make_pipeline(
        vae=networks.vae, unet=networks.unet, text_encoder=networks.text_encoder,
        tokenizer=networks.tokenizer, controlnet=controlnet, scheduler=scheduler,
    )  # fmt: skip


def with_controlnet(loaded: LoadedPipeline, checkpoint_path: str) -> LoadedPipeline:
    """Put another ControlNet in front of a base that is loaded already.

    Args:
        loaded: stays as it is; the networks of its base are shared.
        checkpoint_path: controlnet.pth, final_model folder, Lightning .ckpt or single file.

    Raises:
        FileNotFoundError, ValueError: names the file to correct.
    """
    controlnet = _build_controlnet(
        read_controlnet_weights(checkpoint_path), record=find_record(checkpoint_path),
        networks=loaded.base, source=checkpoint_path,
    )  # fmt: skip
    unet = loaded.base.unet
    controlnet.to(device=unet.device, dtype=unet.dtype)  # type: ignore[call-arg]
    pipeline = _join(loaded.base, controlnet, scheduler=loaded.pipeline.scheduler)
    return replace(loaded, pipeline=pipeline)


def _build_controlnet(
    weights: dict[str, Tensor], *, record: InpaintingRecord | None, networks: Base, source: str
) -> ControlNetModel:
    """Build the ControlNet of a base with weights that were trained with it."""
    check_record(record, base=networks)
    recorded_hash = record.base_unet_sha256 if record else None
    if recorded_hash is not None and recorded_hash != base_hash(networks.unet):
        logger.warning("%s is not the base that %s was trained with.", networks.name, source)
    controlnet = build_controlnet(networks.unet, stride=networks.stride)
    controlnet.requires_grad_(False).eval()
    load_controlnet_weights(controlnet, weights, source=source)
    return controlnet


def find_base(
    checkpoint_path: str,
    *,
    weights: Mapping[str, Tensor],
    record: InpaintingRecord | None,
    demo_base: Path,
) -> tuple[str, str | None]:
    """Return the base that was recorded, and its configurations' place.

    Weights without a record are taken for those of the trainer's default base, if they read the
    hidden states of its text encoder: older trainers recorded nothing.

    Args:
        checkpoint_path: where the weights lie.
        weights: by diffusers' names.
        record: None where there is none.
        demo_base: the demo's, for weights that were trained on it.

    Raises:
        ValueError: nothing says which base the weights belong to, or where it is.
    """
    if record is None:
        reader = weights.get(TEXT_READER)
        if reader is not None and reader.shape[-1] == DEFAULT_BASE_TEXT_WIDTH:
            logger.warning(
                "%s doesn't say which base it was trained with: taking %s. Name another one with "
                "--pretrained_model_name_or_path.", checkpoint_path, DEFAULT_BASE,
            )  # fmt: skip
            return DEFAULT_BASE, None
        raise ValueError(
            f"{checkpoint_path} must come with a record of its base, got none beside it. "
            "Name the base that it was trained with: --pretrained_model_name_or_path."
        )
    if "/" in record.base:  # a hub id: names of folders and files have no slash
        return record.base, None
    # The record travels with the weights and holds no local paths: run.json stays and does.
    trained_on = read_run_arguments(Path(checkpoint_path))
    name = trained_on.get("pretrained_model_name_or_path")
    if name and Path(name).exists():
        return name, trained_on.get("base_config")
    if record.base == "demo":
        return str(demo_base), None
    raise ValueError(
        f"the base '{record.base}', which the weights were trained with, must be found, got no "
        "such folder in run.json. Name it with --pretrained_model_name_or_path."
    )


def read_run_arguments(checkpoint_path: Path) -> dict[str, str]:
    """Return the flags in run.json of the run that the weights lie in, {} outside a run."""
    folder = checkpoint_path.resolve()
    for candidate in (folder, *folder.parents[:2]):
        path = candidate / "run.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8")).get("arguments", {})
    return {}


def check_record(record: InpaintingRecord | None, *, base: Base) -> None:
    """Refuse weights that were trained for another geometry or another mark of the hole.

    Raises:
        ValueError: says what differs.
    """
    if record is None:
        return
    if record.vae_stride != base.stride:
        raise ValueError(
            f"the base's VAE must have the stride {record.vae_stride} of the weights' own base "
            f"({record.base}), got {base.stride}. Name that one: --pretrained_model_name_or_path."
        )
    if record.hole_value != HOLE_VALUE or record.image_range != (0.0, 1.0):
        raise ValueError(
            f"the weights must have learnt holes as {HOLE_VALUE:g} beside pixels in [0, 1], got "
            f"{record.hole_value:g} beside {list(record.image_range)}. Use a ControlNet of this "
            "trainer."
        )
