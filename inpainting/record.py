"""The record: what somebody must know to use a ControlNet, and how it is written down.

It travels with the weights, as inpainting.json, in a safetensors file's metadata and in run.json,
and names no local path. It is read strictly: a wrong hole value or prediction type would not fail
but fill holes with noise.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RECORD_NAME = "inpainting.json"
RECORD_VERSION = 1
# The key of the record in a safetensors file's metadata and in run.json.
RECORD_KEY = "inpainting"
CONDITIONING = "RGB in [0, 1], all three channels -1 in the hole, full resolution"
PREDICTION_TYPES = ("epsilon", "v_prediction")


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
