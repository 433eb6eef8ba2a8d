"""LPIPS and FID of an evaluation's pictures, by torchmetrics and the networks that it fetches.

Optional: the packages stand in requirements-metrics.txt, and the networks' weights are downloaded
when they are first used.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tools.evaluation_files import Evaluation, picture_path

NUM_AT_ONCE = 32  # pictures
PACKAGES = ("torchvision", "torch_fidelity")


def check_packages() -> None:
    """Refuse where an optional package is missing.

    Raises:
        ValueError: names it.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--perceptual needs the packages of requirements-metrics.txt, got no "
            f"{', '.join(missing)}. pip install -r requirements-metrics.txt"
        )


def measure(
    evaluation: Evaluation, *, device: torch.device
) -> dict[str, dict[str, dict[str, float]]]:
    """Return LPIPS (mean) and FID of the first samples: kind -> candidate -> metric -> value.

    A single picture has no FID. torchmetrics counts it in float64, which MPS hasn't got.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    if device.type == "mps":
        device = torch.device("cpu")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for kind in dict.fromkeys(score.kind for score in evaluation.scores):
        ids = evaluation.image_ids(kind)
        result[kind] = {}
        for name in evaluation.candidates:
            lpips = LearnedPerceptualImagePatchSimilarity(normalize=True).to(device)
            fid = FrechetInceptionDistance().to(device)
            for start in range(0, len(ids), NUM_AT_ONCE):
                few = ids[start : start + NUM_AT_ONCE]
                truth, filled = (
                    _read(evaluation, kind=kind, image_ids=few, name=source).to(device)
                    for source in ("truth", name)
                )
                lpips.update(filled.float() / 255, truth.float() / 255)
                fid.update(truth, real=True)
                fid.update(filled, real=False)
            result[kind][name] = {"lpips": float(lpips.compute())}
            if len(ids) > 1:
                result[kind][name]["fid"] = float(fid.compute())
    return result


def _read(evaluation: Evaluation, *, kind: str, image_ids: Sequence[int], name: str) -> Tensor:
    """Return the pictures of one name, (N, 3, H, W) uint8."""
    paths = [
        picture_path(evaluation.folder, kind, image_id=image_id, name=name)
        for image_id in image_ids
    ]
    pictures = np.stack([np.asarray(Image.open(path)) for path in paths])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)
