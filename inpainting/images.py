"""Reading picture and mask files as people have them, and cutting squares out of both.

Files come from outside, so everything is checked here, once: what these functions return is an
upright RGB picture or a mask of 0 and 1, and what they refuse they refuse in one line. Colour
profiles are not applied. Terms: *upright* means that the EXIF rotation has been carried out; a
*box* is (left, top, side), a square in pixels of the upright picture.
"""

from __future__ import annotations

import errno
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

# What Pillow may try. Its other readers are left out: one starts Ghostscript, most guess.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

# What Pillow's readers raise for files that are not what they seem.
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(AttributeError, AssertionError, RuntimeError, struct.error, zlib.error),
)
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NUM_SAMPLES = 2**20  # so many pixels of a large mask tell what kind of file it is


@dataclass(frozen=True)
class Layers:
    """All that a picture file holds.

    Attributes:
        image: (H, W, 3) uint8 RGB, upright, transparent parts over white.
        transparent: (H, W, 4) uint8, the file's own RGBA; None for an opaque kind of file.
        icc_profile: how its RGB values are meant, if it says so.
    """

    image: np.ndarray
    transparent: np.ndarray | None
    icc_profile: bytes | None


def open_image(path: str | Path) -> Image.Image:
    """Open a picture file as an upright RGB picture.

    Grey, palette, CMYK and 16-bit files (scaled, not clipped) are converted; what is transparent
    shows white, as in a viewer; of an animation the first frame counts.

    Args:
        path: a file of one of `FORMATS`; its extension is not looked at.

    Returns:
        A loaded PIL image of mode RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, too large or not a picture.
    """
    return _to_rgb(_load(path), path=path)


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture file as `open_image` does.

    Returns:
        (H, W, 3) uint8 RGB, writable.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, too large or not a picture.
    """
    return np.array(open_image(path))


def read_layers(path: str | Path) -> Layers:
    """Read a picture file as `read_image` does, and keep what RGB alone would lose.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, too large or not a picture.
    """
    file = _load(path)
    is_transparent = file.has_transparency_data and not _is_deep(file)
    return Layers(
        image=np.array(_to_rgb(file, path=path)),
        transparent=np.array(file.convert("RGBA")) if is_transparent else None,
        # A CMYK or grey file's profile doesn't describe the RGB values.
        icc_profile=file.info.get("icc_profile") if file.mode in ("RGB", "RGBA") else None,
    )


def read_mask(path: str | Path) -> np.ndarray:
    """Read a mask file: white, or one colour on black, is the hole.

    Two levels may have any values (0/1, 0/128, 16-bit); soft edges and JPEG noise are cut at half
    of the brightest level. Where a file is transparent, paint of one colour on nothing is the hole,
    whatever the colour; otherwise what is transparent is kept.

    Args:
        path: a file of one of `FORMATS`.

    Returns:
        (H, W) uint8 {0, 1}, 1 = hole, with at least one pixel of each; the file's own size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file can't be read, shows a photograph, several labels or colours, or
            has no hole or nothing but hole.
    """
    image = _load(path)
    try:
        levels = _mask_levels(image, path=path)
        return _threshold(levels, is_jpeg=image.info["is_jpeg"])
    except _NotAMask as reason:
        raise ValueError(
            f"{path} must be a mask, white where the hole is and black elsewhere, got {reason}"
        ) from None


def crop_box(width: int, height: int, *, rng: np.random.Generator | None) -> tuple[int, int, int]:
    """Return the largest square of a picture, placed along its longer side.

    Args:
        width: of the picture, in pixels.
        height: likewise.
        rng: places the square at random; None places it in the middle.

    Returns:
        (left, top, side) in pixels of the picture.
    """
    side = min(width, height)
    slack = max(width, height) - side
    offset = slack // 2 if rng is None else int(rng.integers(slack + 1))
    return (offset, 0, side) if width > height else (0, offset, side)


def resize_image(
    image: Image.Image | np.ndarray, *, box: tuple[int, int, int], size: int, flip: bool
) -> np.ndarray:
    """Cut out a box, bring it to a size in one antialiased resize, and mirror it.

    Args:
        image: RGB, as a PIL image or (H, W, 3) uint8.
        box: (left, top, side) in pixels of the image.
        size: side of the result in pixels.
        flip: mirror left and right, after the cut.

    Returns:
        (size, size, 3) uint8 RGB.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=_corners(box))
    return np.array(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else square)


def resize_mask(
    mask: np.ndarray, *, box: tuple[int, int, int], size: int, flip: bool
) -> np.ndarray:
    """Cut out, resize and mirror a mask exactly as `resize_image` does its picture.

    Args:
        mask: (H, W) uint8 {0, 1}.
        box: (left, top, side) in pixels of the mask.
        size: side of the result in pixels.
        flip: mirror left and right, after the cut.

    Returns:
        (size, size) uint8 {0, 1}: 1 where the hole covers at least half of the pixel's area
        (to within 1/255: Pillow rounds between its two passes).
    """
    coverage = Image.fromarray(mask * np.uint8(255)).resize(
        (size, size), Image.Resampling.BOX, box=_corners(box)
    )
    resized = np.asarray(coverage) >> 7
    return np.ascontiguousarray(resized[:, ::-1]) if flip else resized


class _NotAMask(Exception):
    """Why a readable file is no mask: "<what it is>. <what to do next>."."""


def _corners(box: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return a box as Pillow wants it: left, top, right, bottom."""
    left, top, side = box
    return left, top, left + side, top + side


def _load(path: str | Path) -> Image.Image:
    """Decode the first frame of a file and turn it upright, in the file's own mode."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} must exist, got no such file. Check the path.")
    if not path.is_file():
        raise ValueError(f"{path} must be a picture file, got a folder. Name a file.")
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on EXIF and palettes, once per file and worker
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        must = f"{path} must be a whole picture of format {', '.join(FORMATS)}"
        try:
            image = Image.open(file, formats=FORMATS)
            is_jpeg = image.format in ("JPEG", "MPO")
            image.load()  # truncated files fail here, not when opened
            image = _turn_upright(image)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ValueError(
                f"{path} must have at most {Image.MAX_IMAGE_PIXELS} pixels, got more. "
                "Scale the picture down."
            ) from None
        except Image.UnidentifiedImageError:
            got = "an empty file" if path.stat().st_size == 0 else "something else"
            file.seek(0)
            if file.read(30).startswith(b"version https://git-lfs"):
                got = "a Git LFS pointer (git lfs pull fetches the picture)"
            raise ValueError(f"{must}, got {got}. Replace or remove the file.") from None
        except DECODE_ERRORS as error:
            # With a number it is the disk's fault, except for a place that no file has (EINVAL).
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{must}, got {reason!r}. Replace or remove the file.") from None
    image.info["is_jpeg"] = is_jpeg
    return image


def _turn_upright(image: Image.Image) -> Image.Image:
    """Carry out the EXIF rotation; EXIF data that can't be read counts as none."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION_TAG, 1))
    except DECODE_ERRORS:
        turn = None
    return image if turn is None else image.transpose(turn)


def _is_deep(image: Image.Image) -> bool:
    """Say whether an image is 16-bit (or wider) grey."""
    return image.mode == "I" or image.mode.startswith("I;16")


def _to_rgb(image: Image.Image, *, path: str | Path) -> Image.Image:
    """Convert a picture of any mode to RGB, transparent parts over white."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if _is_deep(image):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"{path} must have 8 or 16 bits per channel, got values in "
                f"[{levels.min()}, {levels.max()}]. Save it as an 8-bit picture."
            )
        # 65535 = 255 * 257; convert("RGB") would clip at 255.
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError(
            f"{path} must have 8 or 16 bits per channel, got floating point. "
            "Save it as an 8-bit picture."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError:
        raise ValueError(
            f"{path} must be grey, RGB, CMYK or palette, got mode {image.mode}. "
            "Save it as an RGB picture."
        ) from None


def _mask_levels(image: Image.Image, *, path: str | Path) -> np.ndarray:
    """Reduce a mask file to one number a pixel, low = keep: (H, W) uint8 or int32."""
    if _is_deep(image):
        levels = np.asarray(image).astype(np.int32)
        if levels.min() < 0 or levels.max() > 65535:
            raise _NotAMask("32-bit values. Save it as an 8-bit grey picture.")
        # 8-bit values in a 16-bit file are common, and would vanish if scaled.
        is_two_level = bool(np.all((levels == levels.min()) | (levels == levels.max())))
        return levels if levels.max() <= 255 or is_two_level else (levels + 128) // 257
    if image.mode in ("1", "L") and not image.has_transparency_data:
        return np.asarray(image.convert("L"))
    if image.has_transparency_data:
        pixels = np.asarray(image.convert("RGBA"))
        alpha = pixels[..., 3]
        if alpha.min() < alpha.max():  # a constant alpha says nothing
            return _transparent_levels(pixels[..., :3], alpha)
        rgb = pixels[..., :3]
    else:
        rgb = np.asarray(_to_rgb(image, path=path))
    if image.mode == "P" and rgb.min() == rgb.max():
        return np.asarray(image)  # the palette was lost; the index is what is left
    return _colour_levels(rgb)


def _transparent_levels(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Read a mask with transparent parts: paint of one colour on nothing, or colours on black."""
    paint = rgb[alpha >= 128]
    if paint.size and np.all(np.ptp(paint, axis=0) <= 8):
        return alpha
    try:
        return _colour_levels((rgb * (alpha[..., None] / np.float32(255))).astype(np.uint8))
    except _NotAMask:
        raise _NotAMask(
            "a picture with transparent parts, which may mean hole or keep. "
            "Save the mask alone, as black and white."
        ) from None


def _colour_levels(rgb: np.ndarray) -> np.ndarray:
    """Return the brightest channel of an image that shows one colour on black, as (H, W) uint8."""
    levels = rgb.max(axis=2)
    step = max(1, int((levels.size / NUM_SAMPLES) ** 0.5))
    sample = rgb[::step, ::step].reshape(-1, 3).astype(np.float32)
    bright = sample.max(axis=1) >= max(int(levels.max()) / 2, 1)
    if not bright.any():
        return levels
    paint = np.median(sample[bright], axis=0)
    along = (sample @ paint / (paint @ paint))[:, None]
    # Chroma is stored coarsely in a JPEG: at the rim of a red stroke colours stray.
    stray = np.abs(sample - along * paint).max(axis=1) > 40
    if stray.mean() > 0.02 or stray.sum() > bright.sum() / 2:
        raise _NotAMask("several colours. Save the mask as black and white.")
    return levels


def _threshold(levels: np.ndarray, *, is_jpeg: bool) -> np.ndarray:
    """Cut levels at half of the brightest; refuse what isn't dark and bright.

    Args:
        levels: (H, W) integers >= 0.
        is_jpeg: such a file can't hold the values 0 and 1 for black and white.
    """
    low, high = int(levels.min()), int(levels.max())
    if high == 0 or (is_jpeg and high < 64):
        raise _NotAMask("no hole: it is all black. Paint the hole white.")
    if 4 * low > high:
        raise _NotAMask("nothing to keep: there is no black. Paint what to keep black.")
    mask = (2 * levels.astype(np.int32) >= high).astype(np.uint8)
    if np.all((levels == low) | (levels == high)):
        return mask
    if high < 128:
        raise _NotAMask(
            f"more than two levels, the brightest {high} of 255. If these are labels, save the "
            "one to fill as white."
        )
    quarters = 4 * levels.astype(np.int32)
    middle = np.mean((quarters > high) & (quarters < 3 * high))
    hole = mask.mean()
    if middle > 0.05 and middle > 0.4 * min(hole, 1 - hole):
        raise _NotAMask(
            f"half-tones on {middle:.0%} of the picture. Is it a photograph? "
            "Save the mask as black and white."
        )
    return mask
