"""The final_model folder: what a run hands out, and finding its record again.

    controlnet.pth                        plain dict of fp32 CPU tensors with diffusers' names
    diffusion_pytorch_model.safetensors   the same tensors; the record stands in the metadata
    config.json                           diffusers' own
    inpainting.json                       the record
    README.md                             the model card

Each file appears whole or not at all. No file names a local path.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inpainting.atomic import replace_atomically, write_text_atomically
from inpainting.model_card import format_model_card
from inpainting.record import RECORD_KEY, RECORD_NAME, InpaintingRecord

HASHED_SIGNS_PER_TENSOR = 4096

_RUN_PARTS = ("checkpoints", "final_model")  # folders one level below their run folder


def write_final_model(
    folder: str | Path,
    *,
    controlnet: ControlNetModel,
    record: InpaintingRecord,
    training: Mapping[str, object],
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the folder that diffusers, infer.py and the web interfaces read.

    Args:
        folder: made when missing; files of the same names are replaced one by one, each whole.
        controlnet: gives the configuration, and the weights unless state_dict does.
        record: how the weights are to be used.
        training: further facts for the model card, by their names there; no local paths.
        state_dict: other weights for it, such as the average, with diffusers' names.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = controlnet.state_dict() if state_dict is None else state_dict
    tensors = {name: _for_saving(tensor) for name, tensor in weights.items()}
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    card = format_model_card(record, num_parameters=num_parameters, training=training)
    config = json.loads(controlnet.to_json_string())
    config.pop("_name_or_path", None)  # where this machine had the weights that were continued
    # The weights before what vouches for them: a record never stands beside older weights alone.
    # Through an open file: torch.save would keep the temporary file's name, another each time.
    with replace_atomically(folder / "controlnet.pth") as path, path.open("wb") as file:
        torch.save(tensors, file)
    write_weights(folder / "diffusion_pytorch_model.safetensors", tensors=tensors, record=record)
    write_config(folder / "config.json", config=config)
    write_text_atomically(folder / RECORD_NAME, record.to_json())
    write_text_atomically(folder / "README.md", card)
    return folder


def _for_saving(tensor: Tensor) -> Tensor:
    """Return the values in fp32 on CPU, alone in their storage: torch.save writes all of it."""
    tensor = tensor.detach().to("cpu", torch.float32).contiguous()
    is_alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_alone else tensor.clone()


def write_weights(
    path: Path, *, tensors: Mapping[str, Tensor], record: InpaintingRecord | None
) -> None:
    """Write a safetensors file with the record, if there is one, in its metadata."""
    metadata = {"format": "pt"}  # diffusers refuses a file without it
    if record is not None:
        metadata[RECORD_KEY] = record.to_json()
    with replace_atomically(path) as temporary:
        save_file(dict(tensors), temporary, metadata)
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Bring a safetensors file's metadata into order: safetensors writes it in a random one."""
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


def write_config(path: Path, *, config: Mapping[str, Any]) -> None:
    """Write a config.json as diffusers does."""
    write_text_atomically(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def find_record(path: str | Path) -> InpaintingRecord | None:
    """Find what was recorded about a weight file or folder.

    Looked up in this order: the file's own metadata, inpainting.json beside it (or in the folder),
    the final_model of the run that the file or folder belongs to, that run's run.json.

    Returns:
        The record, or None for weights of other trainers and for a lone .pth.

    Raises:
        ValueError: there is a record, but it is damaged or of a newer version.
    """
    path = Path(path)
    if path.is_file():
        metadata = _read_metadata(path)
        if metadata is not None and RECORD_KEY in metadata:
            return _parse_record(metadata[RECORD_KEY], path)
    folder = path if path.is_dir() else path.parent
    run_folder = folder.resolve().parent if folder.resolve().name in _RUN_PARTS else folder
    for candidate in (folder / RECORD_NAME, run_folder / "final_model" / RECORD_NAME):
        if candidate.is_file():
            return _parse_record(candidate.read_bytes(), candidate)
    run_json = run_folder / "run.json"
    return _record_of_run(run_json) if run_json.is_file() else None


def _record_of_run(run_json: Path) -> InpaintingRecord | None:
    try:
        run = json.loads(run_json.read_bytes())
        fields = run.get(RECORD_KEY) if isinstance(run, dict) else None
        return None if fields is None else InpaintingRecord.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"{run_json}: {error}") from error


def _parse_record(text: str | bytes, source: Path) -> InpaintingRecord:
    try:
        return InpaintingRecord.from_json(text)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _read_metadata(path: Path) -> dict[str, str] | None:
    """Return a safetensors file's metadata; None when it has none or is another kind of file."""
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":
            return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata()
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, got: {error}. Fetch it again."
        ) from error


def base_hash(unet: nn.Module) -> str:
    """Return a short hash that tells one base's UNet from another's, 16 hexadecimal digits.

    SHA-256 over every tensor's name, shape and the signs of up to 4096 of its values, evenly
    spread. Signs, because they survive a cast: the base that was trained on in float32 is
    recognised in float16 (-0.0 keeps its sign too). A fine-tuning turns some of the millions.
    Milliseconds, where hashing the 3.4 GB of SD 1.5 takes seconds.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        step = max(1, tensor.numel() // HASHED_SIGNS_PER_TENSOR)
        values = tensor.detach().flatten()[::step][:HASHED_SIGNS_PER_TENSOR]
        digest.update(np.packbits(torch.signbit(values).cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]
