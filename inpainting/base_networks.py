"""A base's networks and tokenizer, read strictly: the libraries make up what a file lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from inpainting.base import BaseConfig
from inpainting.interop import NUM_SHOWN, describe_mismatch, read_weight_file
from inpainting.single_file import read_single_file

BASE_PARTS = ("vae", "unet", "text_encoder")  # the folders of a base that hold weights

Networks = tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel]


def load_networks(config: BaseConfig, *, dtype: torch.dtype) -> Networks:
    """Load VAE, UNet and text encoder onto the CPU.

    Args:
        config: of the base; its weights are where it was read from.
        dtype: of UNet and text encoder; the VAE is in float32.

    Raises:
        ValueError: the weights are missing, torn, or don't fit the configuration.
    """
    parts = _load_single_file(config) if config.single_file else _load_folder(config, dtype)
    for name, network in zip(BASE_PARTS, parts, strict=True):
        nn.Module.to(network, dtype=torch.float32 if name == "vae" else dtype)
    return parts


def load_tokenizer(config: BaseConfig) -> CLIPTokenizer:
    """Load a base's tokenizer.

    Raises:
        ValueError: its files are missing or torn.
    """
    folder = config.config_dir / "tokenizer"
    needed = f"the base {config.name} must hold a CLIP tokenizer (vocab.json, merges.txt), got"
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise ValueError(f"{needed} no {name} in {folder}. Fetch it again.")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its libraries raise that very class for a torn file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{needed} {folder}: {reason}. Fetch it again.") from error


def _load_folder(config: BaseConfig, dtype: torch.dtype) -> Networks:
    """Load a diffusers folder or hub id."""
    try:
        folder = Path(config.name_or_path)
        if folder.is_dir():
            files = [_choose_files(folder / part) for part in BASE_PARTS]
            loaded = _load_parts(config.name_or_path, dtype, files)
        else:
            loaded = _load_from_hub(config.name_or_path, dtype)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(_describe_misfit(config, str(error).strip().splitlines()[0])) from error
    for part, (_, info) in zip(BASE_PARTS, loaded, strict=True):
        for kind in ("missing", "unexpected", "mismatched"):
            if info[f"{kind}_keys"]:
                names = ", ".join(str(key) for key in sorted(info[f"{kind}_keys"])[:NUM_SHOWN])
                count = len(info[f"{kind}_keys"])
                raise ValueError(_describe_misfit(config, f"{part}: {count} {kind}: {names}."))
    vae, unet, text_encoder = (network for network, _ in loaded)
    return vae, unet, text_encoder


def _choose_files(folder: Path) -> dict[str, Any]:
    """Return what tells the libraries which files of a network to read.

    Safetensors where there are some, then pickles, then the "fp16" form, which many people fetch
    alone.

    Raises:
        ValueError: a pickle holds more than weights.
    """
    if any("." not in path.stem for path in folder.glob("*.safetensors")):
        return {"use_safetensors": True}
    pickles = list(folder.glob("*.bin"))
    is_whole = any("." not in path.stem for path in pickles)
    if not is_whole and any(folder.glob("*.fp16.safetensors")):
        return {"use_safetensors": True, "variant": "fp16"}
    for path in pickles:
        read_weight_file(path)  # mapped; the libraries' own refusals differ
    return {}


def _load_from_hub(hub_id: str, dtype: torch.dtype) -> Any:
    """Load what the hub's cache holds, and ask the hub for the rest alone.

    Without a network diffusers asks for each file six times, half a minute long, and then takes
    the cached one after all.
    """
    try:
        return _load_parts(hub_id, dtype, [{"local_files_only": True}] * len(BASE_PARTS))
    except OSError:
        return _load_parts(hub_id, dtype, [{}] * len(BASE_PARTS))


def _load_parts(name: str, dtype: torch.dtype, options: Sequence[dict[str, Any]]) -> Any:
    """Return VAE, UNet and text encoder, each with what was missing or left over."""
    for_vae, for_unet, for_text = ({"output_loading_info": True, **more} for more in options)
    return (
        AutoencoderKL.from_pretrained(name, subfolder="vae", torch_dtype=torch.float32, **for_vae),
        UNet2DConditionModel.from_pretrained(name, subfolder="unet", torch_dtype=dtype, **for_unet),
        CLIPTextModel.from_pretrained(
            name, subfolder="text_encoder", dtype=dtype, ignore_mismatched_sizes=True, **for_text
        ),
    )


def _load_single_file(config: BaseConfig) -> Networks:
    """Load a file in the authors' own format."""
    assert config.single_file is not None
    with init_empty_weights():
        vae = cast(AutoencoderKL, AutoencoderKL.from_config(config.vae))
        unet = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(config.unet))
        text_encoder = CLIPTextModel(CLIPTextConfig(**config.text_encoder))
    weights = read_single_file(config.single_file, config=config, text_encoder=text_encoder)
    for part, network, state_dict in (
        ("vae", vae, weights.vae),
        ("unet", unet, weights.unet),
        ("text_encoder", text_encoder, weights.text_encoder),
    ):
        mismatch = describe_mismatch(network.state_dict(), state_dict)
        if mismatch:
            raise ValueError(_describe_misfit(config, f"{part}: {mismatch}."))
        network.load_state_dict(state_dict, strict=True, assign=True)
    return vae, unet, text_encoder


def _describe_misfit(config: BaseConfig, reason: str) -> str:
    return (
        f"the base {config.name} must hold the weights that its configuration describes, got "
        f"{reason} Fetch it again, or correct --pretrained_model_name_or_path or --base_config."
    )
