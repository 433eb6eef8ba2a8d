"""Pictures and their masks as files: which belong together, how they are read, what is written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from inpainting.atomic import replace_atomically
from inpainting.images import read_layers, read_mask

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MASK_ENDING = "_mask"
LARGE_HOLE = 0.9  # share of the picture above which black and white may have been confused
PANEL_PX = 1024  # longest side of a picture in comparison.png
GAP_PX = 8


@dataclass(frozen=True)
class Job:
    """One picture with its mask; `prefix` starts the names of what is written."""

    image_path: Path
    mask_path: Path
    prefix: str


@dataclass(frozen=True)
class Picture:
    """One picture as it is read.

    Attributes:
        image: (H, W, 3) uint8 RGB, upright, transparent parts over white: what the networks see.
        transparent: (H, W, 4) uint8, the file's own RGBA; None for an opaque kind of file.
        mask: (H, W) uint8, 1 = hole, as it will be used.
        icc_profile: how the file's RGB values are meant, if it says so.
    """

    image: np.ndarray
    transparent: np.ndarray | None
    mask: np.ndarray
    icc_profile: bytes | None


def find_jobs(image_path: Path, mask_path: Path) -> list[Job]:
    """Pair pictures with masks; in folders, say by name what has no partner.

    Raises:
        FileNotFoundError: something named doesn't exist, or no pair was found.
        ValueError: a file and a folder, or two pictures of one name.
    """
    for flag, path in (("--input_image", image_path), ("--input_mask", mask_path)):
        if not path.exists():
            raise FileNotFoundError(f"{flag} must exist, got {path}. Check the path.")
    if image_path.is_dir() != mask_path.is_dir():
        raise ValueError(
            "--input_image and --input_mask must be two files or two folders, got "
            f"{image_path} and {mask_path}."
        )
    if image_path.is_file():
        return [Job(image_path, mask_path, prefix="")]
    jobs = _pair_by_name(image_path, mask_path)
    if not jobs:
        raise FileNotFoundError(
            f"pictures and masks must share names (cat.jpg with cat.png or cat_mask.png), got no "
            f"pair in {image_path} and {mask_path}. Rename them, or name one file each."
        )
    return jobs


def _pair_by_name(image_dir: Path, mask_dir: Path) -> list[Job]:
    images, masks = by_stem(image_dir), by_stem(mask_dir)
    if image_dir.resolve() == mask_dir.resolve():
        masks = {stem: path for stem, path in masks.items() if stem.endswith(MASK_ENDING)}
        images = {stem: path for stem, path in images.items() if stem not in masks}
    partners = {stem: masks.get(stem) or masks.get(stem + MASK_ENDING) for stem in images}
    jobs = [
        Job(images[stem], mask, prefix=f"{stem}_") for stem, mask in partners.items() if mask
    ]  # fmt: skip
    without_mask = [images[stem] for stem, mask in partners.items() if not mask]
    without_image = set(masks.values()) - {job.mask_path for job in jobs}
    for what, paths in (("mask", without_mask), ("picture", without_image)):
        if paths:
            names = ", ".join(sorted(path.name for path in paths))
            logger.warning("left out, no %s for: %s.", what, names)
    return jobs


def by_stem(folder: Path) -> dict[str, Path]:
    """Return a folder's pictures by their names without suffix, sorted.

    Raises:
        ValueError: two files share a name: their results would overwrite each other.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in PICTURE_SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise ValueError(
                f"files in a folder must differ in more than the suffix, got {found[path.stem]} "
                f"and {path.name}. Rename one."
            )
        found[path.stem] = path
    return found


def read_picture(job: Job, *, invert_mask: bool, mask_grow: int) -> Picture:
    """Read a picture and its mask, and bring the mask to its final form.

    Args:
        job: where they are.
        invert_mask: black is the hole, not white.
        mask_grow: source pixels by which the hole grows.

    Raises:
        FileNotFoundError, ValueError: names the file and what is wrong with it.
    """
    # Not above: find_jobs answers before torch is imported.
    from inpainting.holes import check_proportions, fit_mask, grow_mask

    layers = read_layers(job.image_path)
    height, width, _ = layers.image.shape
    try:
        check_proportions(height, width)
    except ValueError as error:
        raise ValueError(f"{job.image_path}: {error}") from error
    mask = read_mask(job.mask_path)
    if invert_mask:
        mask = 1 - mask
    try:
        mask = fit_mask(mask, height=height, width=width)
    except ValueError as error:
        raise ValueError(f"{job.mask_path}: {error}") from error
    if mask_grow:
        mask = grow_mask(mask, radius_px=mask_grow)
    if mask.mean() > LARGE_HOLE:
        logger.warning(
            "%s: the hole covers %.0f %% of the picture. If it is the wrong way round, %s "
            "--invert_mask.", job.mask_path, 100 * mask.mean(), "drop" if invert_mask else "add",
        )  # fmt: skip
    return Picture(
        image=layers.image,
        transparent=layers.transparent,
        mask=mask,
        icc_profile=layers.icc_profile,
    )


def write_results(
    results: Sequence[np.ndarray],
    *,
    picture: Picture,
    output_dir: Path,
    prefix: str,
    mask_blur: int,
) -> list[Path]:
    """Write the results and their comparison, each file whole or not at all.

    Args:
        results: (H, W, 3) uint8 each.
        picture: what they were filled from.
        output_dir: where they go.
        prefix: starts the files' names.
        mask_blur: source pixels outside the hole over which the fill faded.

    Returns:
        What was written: inpainted.png, inpainted_1.png ... comparison.png.
    """
    outputs = {f"inpainted_{i}.png" if i else "inpainted.png": r for i, r in enumerate(results)}
    if picture.transparent is not None:
        outputs = {
            name: restore_alpha(result, picture=picture, mask_blur=mask_blur)
            for name, result in outputs.items()
        }
    mask = np.repeat(picture.mask[..., None] * np.uint8(255), 3, axis=2)
    outputs["comparison.png"] = compare([picture.image, mask, *results])
    paths = []
    for name, pixels in outputs.items():
        path = output_dir / (prefix + name)
        with replace_atomically(path) as temporary:
            Image.fromarray(pixels).save(temporary, "PNG", icc_profile=picture.icc_profile)
        paths.append(path)
    return paths


def restore_alpha(result: np.ndarray, *, picture: Picture, mask_blur: int) -> np.ndarray:
    """Give a result its file's alpha back, and the known pixels their colours under it.

    A hole that was cut out to nothing becomes opaque: else nobody would see what fills it.

    Returns:
        (H, W, 4) uint8.
    """
    from inpainting.sampling import fade_mask

    assert picture.transparent is not None
    restored = picture.transparent.copy()
    is_new = fade_mask(picture.mask, width_px=mask_blur) > 0
    restored[is_new, :3] = result[is_new]
    hole = picture.mask == 1
    if not restored[hole, 3].any():
        restored[hole, 3] = np.uint8(255)
    return restored


def compare(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Put (H, W, 3) uint8 pictures of one size side by side, none longer than PANEL_PX."""
    small = []
    for panel in panels:
        image = Image.fromarray(panel)
        image.thumbnail((PANEL_PX, PANEL_PX))
        small.append(np.asarray(image))
    gap = np.full((small[0].shape[0], GAP_PX, 3), 255, dtype=np.uint8)
    parts = [part for panel in small for part in (gap, panel)]
    return np.concatenate(parts[1:], axis=1)
