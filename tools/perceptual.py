"""LPIPS and FID of an evaluation's pictures, by torchmetrics and the networks that it fetches.

Optional: the packages stand in requirements-metrics.txt, and the networks' weights are downloaded
when they are first used.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tools.evaluation_files import Evaluation, picture_path

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


def measure(evaluation: Evaluation) -> dict[str, dict[str, dict[str, float]]]:
    """Return LPIPS (mean) and FID of the first samples: kind -> candidate -> metric -> value."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    result: dict[str, dict[str, dict[str, float]]] = {}
    for kind in dict.fromkeys(score.kind for score in evaluation.scores):
        truth = _read(evaluation, kind=kind, name="truth")
        result[kind] = {}
        for name in evaluation.candidates:
            filled = _read(evaluation, kind=kind, name=name)
            lpips = LearnedPerceptualImagePatchSimilarity(normalize=True)
            lpips.update(filled.float() / 255, truth.float() / 255)
            fid = FrechetInceptionDistance()
            fid.update(truth, real=True)
            fid.update(filled, real=False)
            result[kind][name] = {"lpips": float(lpips.compute()), "fid": float(fid.compute())}
    return result


def _read(evaluation: Evaluation, *, kind: str, name: str) -> Tensor:
    """Return all pictures of one name, (N, 3, H, W) uint8."""
    paths = [
        picture_path(evaluation.folder, kind, image_id=image_id, name=name)
        for image_id in evaluation.image_ids(kind)
    ]
    pictures = np.stack([np.asarray(Image.open(path)) for path in paths])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)
