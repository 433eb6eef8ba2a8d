"""What a base is, read from its configuration files alone: nothing heavy is loaded or downloaded.

A *base* is the frozen Stable Diffusion that a ControlNet steers. It is named by a hub id, by a
diffusers folder, or by a single weight file together with the folder (or hub id) of its
configurations. This file decides which bases can be trained on, before any weights are read.
"""

from __future__ import annotations

import json
import reprlib
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
# What is read of each configuration; diffusers leaves out nothing that it saved.
NEEDED_ENTRIES = {
    "unet": ("sample_size", "in_channels", "cross_attention_dim"),
    "vae": ("block_out_channels", "latent_channels"),
    "text_encoder": ("hidden_size",),
    "scheduler": ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"),
}
NEEDED_FILES = (
    "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json",
)  # fmt: skip
# The classes that a configuration may name; it is never looked up by that name, but whoever wrote
# another one there meant another network.
CLASSES = {
    "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel",
}  # fmt: skip
# Entries by which the libraries would fetch code or change what is built.
FOREIGN_CODE_ENTRIES = (
    "auto_map", "custom_pipelines", "quantization_config", "attn_implementation",
    "_attn_implementation", "_attn_implementation_internal",
)  # fmt: skip
# The largest value of each entry that decides how much memory a network takes, several times what
# any Stable Diffusion has; lists hold at most MAX_ENTRIES.
LARGEST = {
    "sample_size": 2048, "in_channels": 64, "out_channels": 64, "latent_channels": 64,
    "block_out_channels": 4096, "layers_per_block": 8, "cross_attention_dim": 2048,
    "attention_head_dim": 512, "num_attention_heads": 256, "norm_num_groups": 512,
    "transformer_layers_per_block": 16, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 48, "vocab_size": 200_000, "max_position_embeddings": 1024,
    "projection_dim": 4096, "num_train_timesteps": 100_000,
}  # fmt: skip
MAX_ENTRIES = 8
CONFIG_FILES = ("model_index.json", "*/config.json", "scheduler/*", "tokenizer/*")


@dataclass(frozen=True)
class BaseConfig:
    """The configurations of one base.

    Attributes:
        name_or_path: what the user named: hub id, folder or single file.
        config_dir: local folder that holds the configurations and the tokenizer.
        single_file: the weight file, or None for a folder or hub id.
        unet, vae, text_encoder, scheduler: the parsed configuration files.
    """

    name_or_path: str
    config_dir: Path
    single_file: Path | None
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]

    @property
    def stride(self) -> int:
        """Pixels per latent along one side: each VAE block but the last halves the picture."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def image_size(self) -> int:
        """The side, in pixels, that the base was trained on: SD 1.5 512, SD 2.1 768."""
        return self.unet["sample_size"] * self.stride

    @property
    def size_multiple(self) -> int:
        """Pixel sizes must be a multiple of this: latents are whole cells."""
        return self.stride

    @property
    def prediction_type(self) -> str:
        """What the scheduler's configuration says: "epsilon" or "v_prediction"."""
        return self.scheduler.get("prediction_type", "epsilon")

    @property
    def name(self) -> str:
        """The hub id, or the folder's or file's own name: never a local path."""
        path = Path(self.name_or_path)
        if path.is_dir():
            return path.resolve().name
        # Not resolved: in the hub's cache a file is a link to one that is called by its hash.
        return path.name if path.exists() else self.name_or_path


def read_base_config(name_or_path: str, *, base_config: str | None = None) -> BaseConfig:
    """Read and check the configurations of a base.

    Args:
        name_or_path: hub id, diffusers folder, or single .safetensors/.ckpt file.
        base_config: for a single file: folder or hub id of its configurations and tokenizer.

    Raises:
        FileNotFoundError: the folder, the file, the hub repository or a configuration is missing.
        ValueError: the base can't be steered by this trainer.
    """
    path = Path(name_or_path)
    single_file = path if path.is_file() else None
    if single_file is not None and path.suffix not in SINGLE_FILE_SUFFIXES:
        raise ValueError(
            f"--pretrained_model_name_or_path must be a hub id, a diffusers folder or a "
            f"{'/'.join(SINGLE_FILE_SUFFIXES)} file, got {name_or_path}."
        )
    if single_file is not None and base_config is None:
        raise ValueError(
            f"a single weight file needs its configurations and tokenizer, got {name_or_path} "
            "alone. Name their folder or hub id with --base_config."
        )
    if single_file is not None and base_config is not None:
        config_dir = _locate_configs(base_config, flag="--base_config")
    else:
        config_dir = _locate_configs(name_or_path, flag="--pretrained_model_name_or_path")
    config = BaseConfig(
        name_or_path=name_or_path,
        config_dir=config_dir,
        single_file=single_file,
        unet=_read_json(config_dir / "unet" / "config.json"),
        vae=_read_json(config_dir / "vae" / "config.json"),
        text_encoder=_read_json(config_dir / "text_encoder" / "config.json"),
        scheduler=_read_json(config_dir / "scheduler" / "scheduler_config.json"),
    )
    _check_is_supported(config)
    return config


def _locate_configs(name_or_path: str, *, flag: str) -> Path:
    """Return a local folder with the configurations, fetching only those from the hub.

    What the hub's cache holds is taken without asking the hub: a base doesn't change between a run
    and its resume, and a machine without a network needn't be told so.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") != 1:
        raise FileNotFoundError(
            f"{flag} must be a hub id, or a diffusers folder or single file that exists, "
            f"got {name_or_path}. Check the path."
        )
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, name_or_path, allow_patterns=list(CONFIG_FILES))
    with suppress(OSError, ValueError):  # every huggingface_hub error is one of the two
        cached = Path(fetch(local_files_only=True))
        if all((cached / name).is_file() for name in NEEDED_FILES):
            return cached
    try:
        return Path(fetch())
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix("Got: ")
        raise FileNotFoundError(
            f"the base {name_or_path} must be a folder on disk or reachable on the hub, got: "
            f"{reason} Download it once and name the folder with {flag}."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"a base must hold {path.parent.name}/{path.name}, got none in {path.parent.parent}. "
            "SD 1.x and 2.x in diffusers' layout are supported."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got: {error}. Fetch the base again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}.")
    return config


def _check_is_supported(config: BaseConfig) -> None:
    """Refuse, in one line, every base but a text-conditioned SD with a 4-channel UNet.

    Raises:
        ValueError: names what the base is instead.
    """
    unet, advice = config.unet, "Name an SD 1.x or 2.x base with --pretrained_model_name_or_path."
    channels = unet.get("in_channels")
    if unet.get("addition_embed_type") or (config.config_dir / "text_encoder_2").is_dir():
        raise ValueError(f"the base must be SD 1.x or 2.x, got SDXL ({config.name}). {advice}")
    for part, class_name in CLASSES.items():
        _check_part(getattr(config, part), part=part, class_name=class_name, advice=advice)
    _check_part(config.scheduler, part="scheduler", class_name=None, advice=advice)
    if channels == 9:
        raise ValueError(
            "the base's UNet must take 4 channels, got 9: this is an inpainting UNet, which a "
            f"ControlNet for plain bases can't share. {advice}"
        )
    for part, names in NEEDED_ENTRIES.items():
        missing = [name for name in names if getattr(config, part).get(name) is None]
        if missing:
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            raise ValueError(
                f"{part}/{file} must say {', '.join(names)}, got no {', '.join(missing)}. "
                "Fetch the base again."
            )
    if channels != 4 or config.vae.get("latent_channels") != 4:
        raise ValueError(
            f"the base's UNet and VAE must have 4 latent channels, got {channels} and "
            f"{config.vae.get('latent_channels')}. {advice}"
        )
    if unet.get("class_embed_type") or unet.get("num_class_embeds"):
        raise ValueError(f"the base must not be class-conditioned, got {config.name}. {advice}")
    if unet.get("cross_attention_dim") != config.text_encoder.get("hidden_size"):
        raise ValueError(
            "the UNet's cross_attention_dim must equal the text encoder's hidden_size, got "
            f"{unet.get('cross_attention_dim')} and {config.text_encoder.get('hidden_size')}. "
            "These configurations don't belong together: fetch the base again."
        )
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"the base must predict epsilon or v_prediction, got {config.prediction_type}. {advice}"
        )


def _check_part(entries: dict[str, Any], *, part: str, class_name: str | None, advice: str) -> None:
    """Refuse a configuration that names foreign code, or claims what would take all memory.

    Raises:
        ValueError: names the entry.
    """
    architectures = entries.get("architectures")
    named = [
        entries.get("_class_name"),
        *(architectures if isinstance(architectures, list) else []),
    ]
    for name in named if class_name is not None else ():
        if name not in (None, class_name):
            raise ValueError(f"the base must have a {class_name}, got {name} in {part}. {advice}")
    for name in FOREIGN_CODE_ENTRIES:
        if entries.get(name) is not None:
            raise ValueError(
                f"the {part}'s configuration must be plain numbers and names, got {name}, by which "
                f"other code would be run. {advice}"
            )
    for name, largest in LARGEST.items():
        value = entries.get(name)
        values = value if isinstance(value, list) else [value]
        is_sound = 0 < len(values) <= MAX_ENTRIES and all(
            number is None or (type(number) is int and 1 <= number <= largest) for number in values
        )
        if not is_sound:
            raise ValueError(
                f"{name} in the {part}'s configuration must be a whole number from 1 to {largest}, "
                f"or up to {MAX_ENTRIES} of them, got {reprlib.repr(value)}. {advice}"
            )
