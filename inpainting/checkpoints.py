"""The final_model folder: what a run hands out, and the record that says how to use it.

    controlnet.pth                        plain dict of fp32 CPU tensors with diffusers' names
    diffusion_pytorch_model.safetensors   the same tensors; the record stands in the metadata
    config.json                           diffusers' own
    inpainting.json                       the record
    README.md                             the model card

Each file appears whole or not at all. No file names a local path.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

RECORD_NAME = "inpainting.json"
RECORD_VERSION = 1
# The key of the record in a safetensors file's metadata and in run.json.
RECORD_KEY = "inpainting"
CONDITIONING = "RGB in [0, 1], all three channels -1 in the hole, full resolution"
PREDICTION_TYPES = ("epsilon", "v_prediction")
HASHED_SIGNS_PER_TENSOR = 4096


@dataclass(frozen=True)
class InpaintingRecord:
    """What somebody must know to use a ControlNet, beside diffusers' own configuration.

    Attributes:
        image_size: side of the training pictures in pixels.
        vae_stride: pixels per latent along one side.
        prediction_type: "epsilon" or "v_prediction".
        base: hub id, the word "demo", or the *name* of the folder or file, never its path.
        base_unet_sha256: `base_hash` of the base's UNet; None for a hub id.
        is_average: whether the weights are the moving average of the trained ones.
        global_step: optimizer steps done.
        hole_value: what a hole holds in the conditioning.
        image_range: what known pixels hold in the conditioning, [lowest, highest].
        conditioning: the convention in words.
        version: of this record's format.
    """

    image_size: int
    vae_stride: int
    prediction_type: str
    base: str
    base_unet_sha256: str | None
    is_average: bool
    global_step: int
    hole_value: float = -1.0
    image_range: tuple[float, float] = (0.0, 1.0)
    conditioning: str = CONDITIONING
    version: int = RECORD_VERSION

    def to_json(self) -> str:
        """Return the record as a JSON object, one field a line."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> InpaintingRecord:
        """Read a record back, strictly.

        Raises:
            ValueError: not JSON, a field is missing, unknown or of another type, or the record
                is of a newer version.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{RECORD_NAME} must be JSON, got: {error}.") from error
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: object) -> InpaintingRecord:
        """Build a record from parsed JSON, strictly; raises ValueError as `from_json` does."""
        if not isinstance(fields, dict):
            raise ValueError(f"{RECORD_NAME} must hold an object, got {type(fields).__name__}.")
        version = fields.get("version")
        if isinstance(version, int) and version > RECORD_VERSION:
            raise ValueError(
                f"{RECORD_NAME} must be of version {RECORD_VERSION} or older, got {version}. "
                "Update this trainer."
            )
        if fields.keys() != _CHECKS.keys():
            difference = ", ".join(sorted(fields.keys() ^ _CHECKS.keys()))
            raise ValueError(
                f"{RECORD_NAME} must hold exactly the {len(_CHECKS)} fields of version "
                f"{RECORD_VERSION}, got a difference in {difference}. Export the weights again."
            )
        for name, (is_valid, wanted) in _CHECKS.items():
            if not is_valid(fields[name]):
                raise ValueError(f"{name} in {RECORD_NAME} must be {wanted}, got {fields[name]!r}.")
        lowest, highest = fields["image_range"]
        return dataclasses.replace(cls(**fields), image_range=(lowest, highest))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image_size": (lambda v: _is_int(v) and v > 0, "a whole number > 0"),
    "vae_stride": (lambda v: _is_int(v) and v > 0, "a whole number > 0"),
    "prediction_type": (lambda v: v in PREDICTION_TYPES, " or ".join(PREDICTION_TYPES)),
    "base": (lambda v: isinstance(v, str) and v != "", "a name"),
    "base_unet_sha256": (lambda v: v is None or isinstance(v, str), "a hash or null"),
    "is_average": (lambda v: isinstance(v, bool), "true or false"),
    "global_step": (lambda v: _is_int(v) and v >= 0, "a whole number >= 0"),
    "hole_value": (_is_number, "a number"),
    "image_range": (
        lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(map(_is_number, v)),
        "two numbers",
    ),
    "conditioning": (lambda v: isinstance(v, str), "a text"),
    "version": (lambda v: _is_int(v) and v > 0, "a whole number > 0"),
}


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
    tensors = {name: _for_saving(tensor, torch.float32) for name, tensor in weights.items()}
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    card = format_model_card(record, num_parameters=num_parameters, training=training)
    config = json.loads(controlnet.to_json_string())
    config.pop("_name_or_path", None)  # where this machine had the weights that were continued
    # The weights before what vouches for them: a record never stands beside older weights alone.
    write_atomically(folder / "controlnet.pth", lambda path: torch.save(tensors, path))
    write_weights(folder / "diffusion_pytorch_model.safetensors", tensors=tensors, record=record)
    write_config(folder / "config.json", config=config)
    write_text(folder / RECORD_NAME, text=record.to_json())
    write_text(folder / "README.md", text=card)
    return folder


def _for_saving(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values on CPU; alone in their storage, since torch.save writes all of it."""
    tensor = tensor.detach().to("cpu", dtype).contiguous()
    is_alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_alone else tensor.clone()


def write_weights(
    path: Path, *, tensors: Mapping[str, Tensor], record: InpaintingRecord | None
) -> None:
    """Write a safetensors file with the record, if there is one, in its metadata."""
    metadata = {"format": "pt"}  # diffusers refuses a file without it
    if record is not None:
        metadata[RECORD_KEY] = record.to_json()
    write_atomically(path, lambda temporary: save_file(dict(tensors), temporary, metadata))


def write_config(path: Path, *, config: Mapping[str, Any]) -> None:
    """Write a config.json as diffusers does."""
    write_text(path, text=json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, *, text: str) -> None:
    """Write a text file whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name beside it, bring it to disk, then rename it.

    A killed process or a full disk leaves the earlier file as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


MODEL_CARD = """\
---
library_name: diffusers
{front_matter}tags:
- controlnet
- inpainting
- stable-diffusion
---

# ControlNet for inpainting, trained on {base}

A ControlNet with {num_parameters:,} parameters that steers a frozen {base} to fill holes in
photographs. It sees the picture with its holes marked:
{conditioning}.

| fact | value |
|---|---|
{facts}

Weights: `diffusion_pytorch_model.safetensors` for diffusers; `controlnet.pth` holds the same
tensors. How the control image is built stands in `inpainting.json` too.

## Use

Run this in the folder that holds `final_model`, with a square `image.png` and its `mask.png`
(white = fill):

```python
{snippet}```

An 8-bit picture can't hold -1, so the control image has to be a tensor: given a picture, diffusers
would show the ControlNet a black area instead of a hole.

## Licence

The weights were made from {base} and work only together with it: the licence of that model
applies to them, its rules of use included.
"""

SNIPPET = """\
import numpy as np
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetInpaintPipeline
from PIL import Image

controlnet = ControlNetModel.from_pretrained("{folder}")
pipe = StableDiffusionControlNetInpaintPipeline.{loader}(
    "{base}",{comment}
    controlnet=controlnet,
    safety_checker=None,
)
pipe.scheduler = DDIMScheduler.from_config(
    pipe.scheduler.config, prediction_type="{prediction_type}"
)

size = ({image_size}, {image_size})  # (width, height)
image = Image.open("image.png").convert("RGB").resize(size)
mask = Image.open("mask.png").convert("L").resize(size).point(lambda value: 255 * (value > 127))

pixels = np.array(image)  # (H, W, 3) uint8
hole = np.array(mask) > 127  # (H, W), True = fill
control_image = pixels.astype(np.float32) / 255.0
control_image[hole] = {hole_value}
control_image = torch.from_numpy(control_image).permute(2, 0, 1)[None]  # (1, 3, H, W)
pixels[hole] = 127  # the pipeline encodes the whole picture: what is hidden must not leak

result = pipe(
    prompt="",
    image=Image.fromarray(pixels),
    mask_image=mask,
    control_image=control_image,
    width={image_size},
    height={image_size},
    strength=1.0,
    num_inference_steps=30,
    generator=torch.Generator().manual_seed(42),
).images[0]
Image.composite(result, image, mask).save("inpainted.png")  # known pixels as they were
"""


def format_model_card(
    record: InpaintingRecord, *, num_parameters: int, training: Mapping[str, object]
) -> str:
    """Return the model card: what was trained, on what, and a diffusers program that runs.

    Args:
        record: says how the weights are used.
        num_parameters: of the ControlNet.
        training: further facts for the table, by their names there.
    """
    is_hub_id = "/" in record.base  # names of folders and files have no slash
    is_single_file = record.base.endswith((".safetensors", ".ckpt"))
    what = "file" if is_single_file else "folder"
    snippet = SNIPPET.format(
        folder="final_model",
        base=record.base,
        loader="from_single_file" if is_single_file else "from_pretrained",
        comment="" if is_hub_id else f"  # the {what} of the base that it was trained on",
        prediction_type=record.prediction_type,
        image_size=record.image_size,
        hole_value=record.hole_value,
    )
    facts = {
        "base": record.base,
        "base's UNet (hash)": record.base_unet_sha256 or "as on the hub",
        "picture size": f"{record.image_size} px",
        "prediction type": record.prediction_type,
        "optimizer steps": f"{record.global_step:,}",
        "weights": "moving average" if record.is_average else "as trained",
    } | dict(training)
    return MODEL_CARD.format(
        front_matter=f"base_model: {record.base}\n" if is_hub_id else "",
        base=record.base,
        num_parameters=num_parameters,
        conditioning=record.conditioning,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        snippet=snippet,
    )


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
    # checkpoints/last.ckpt and final_model/ stand one level below their run folder.
    run_folder = folder.resolve().parent if folder.resolve().name in _RUN_PARTS else folder
    for candidate in (folder / RECORD_NAME, run_folder / "final_model" / RECORD_NAME):
        if candidate.is_file():
            return _parse_record(candidate.read_bytes(), candidate)
    run_json = run_folder / "run.json"
    return _record_of_run(run_json) if run_json.is_file() else None


_RUN_PARTS = ("checkpoints", "final_model")


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
