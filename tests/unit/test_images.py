"""Picture and mask files as people have them, and the squares cut out of them."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inpainting.images import (
    crop_box,
    open_image,
    read_image,
    read_layers,
    read_mask,
    resize_image,
    resize_mask,
)

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real pictures are not here")


@pytest.fixture
def hole() -> np.ndarray:
    """Return a (48, 64) uint8 {0, 1} mask: a box and a disc."""
    y, x = np.mgrid[:48, :64]
    return (((y - 30) ** 2 + (x - 45) ** 2 < 120) | ((y < 12) & (x < 20))).astype(np.uint8)


@pytest.fixture
def photo() -> np.ndarray:
    """Return a smooth coloured (48, 64, 3) uint8 picture that no flip leaves as it is."""
    y, x = np.mgrid[:48, :64]
    return np.stack([4 * x, 5 * y, 128 + x - y], axis=-1).astype(np.uint8)


def save(image: Image.Image | np.ndarray, path: Path, **options: Any) -> Path:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, **options)
    return path


# --- pictures -------------------------------------------------------------------------------------


def test_an_rgb_file_comes_back_bit_identical(tmp_path: Path, photo: np.ndarray) -> None:
    image = read_image(save(photo, tmp_path / "a.png"))
    assert image.dtype == np.uint8
    assert image.flags.writeable
    np.testing.assert_array_equal(image, photo)
    assert open_image(tmp_path / "a.png").mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_rotations_are_carried_out(
    tmp_path: Path, photo: np.ndarray, orientation: int
) -> None:
    undo = {  # what the camera did to the upright picture
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo[orientation](photo))
    for suffix in ("png", "tif"):
        path = save(stored, tmp_path / f"a.{suffix}", exif=exif)
        np.testing.assert_array_equal(read_image(path), photo)
    mask = (photo[..., :1] > 128).repeat(3, axis=2) * np.uint8(255)
    stored = np.ascontiguousarray(undo[orientation](mask))
    path = save(stored, tmp_path / "mask.png", exif=exif)
    np.testing.assert_array_equal(read_mask(path), photo[..., 0] > 128)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_broken_exif_is_ignored_silently(
    tmp_path: Path, photo: np.ndarray, exif: bytes, suffix: str
) -> None:
    path = save(photo, tmp_path / f"a.{suffix}", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).shape == photo.shape


def test_an_orientation_that_does_not_exist_is_ignored(tmp_path: Path, photo: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 99
    np.testing.assert_array_equal(read_image(save(photo, tmp_path / "a.png", exif=exif)), photo)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    grey = np.array([[0, 257, 300, 128 * 257, 65535]], np.uint16)
    image = read_image(save(grey, tmp_path / f"a.{suffix}"))
    np.testing.assert_array_equal(image, np.array([[[0], [1], [1], [128], [255]]]).repeat(3, 2))


def test_values_beyond_sixteen_bits_are_refused(tmp_path: Path) -> None:
    path = save(np.array([[0, 70000]], np.int32), tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"8 or 16 bits .* got values in \[0, 70000\]"):
        read_image(path)
    path = save(np.array([[0, 0.5]], np.float32), tmp_path / "b.tif")
    with pytest.raises(ValueError, match=r"8 or 16 bits .* got floating point"):
        read_image(path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_every_common_mode_becomes_rgb(tmp_path: Path, photo: np.ndarray, mode: str) -> None:
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    source = Image.fromarray(photo).convert(mode)
    path = save(source, tmp_path / f"a.{suffix}")
    expected = np.asarray(source.convert("RGB")).astype(int)
    assert np.abs(read_image(path) - expected).mean() < 4


def test_what_is_transparent_shows_white(tmp_path: Path) -> None:
    rgba = np.array([[[9, 8, 7, 255], [9, 8, 7, 0], [0, 0, 0, 51]]], np.uint8)
    image = read_image(save(rgba, tmp_path / "a.png"))
    assert image.tolist() == [[[9, 8, 7], [255, 255, 255], [204, 204, 204]]]
    grey = save(np.array([[[10, 255], [10, 0]]], np.uint8), tmp_path / "la.png")
    assert read_image(grey)[0, :, 0].tolist() == [10, 255]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    path = save(palette, tmp_path / "p.png", transparency=1)
    assert read_image(path).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_opaque_pixels_of_an_rgba_file_come_back_bit_identical(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    colours[..., 3] = 255
    colours[0, 0, 3] = 0
    image = read_image(save(colours, tmp_path / "a.png"))
    np.testing.assert_array_equal(image[1:], colours[1:, :, :3])


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_counts(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert read_image(tmp_path / f"a.{suffix}").max() == 0


def test_one_pixel_is_a_picture(tmp_path: Path) -> None:
    assert read_image(save(np.full((1, 1), 7, np.uint8), tmp_path / "a.png")).tolist() == [
        [[7] * 3]
    ]


def test_the_extension_is_not_looked_at(tmp_path: Path, photo: np.ndarray) -> None:
    save(photo, tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), photo)


@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_a_file_cut_anywhere_is_refused_by_name(
    tmp_path: Path, suffix: str, read: Callable[[Path], np.ndarray]
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    whole = save(noise, tmp_path / f"whole.{suffix}").read_bytes()
    for share in (0.01, 0.1, 0.5, 0.9):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=rf"cut\.{suffix} must be a whole picture") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_damaged_bytes_are_read_or_refused_but_never_crash(
    tmp_path: Path, photo: np.ndarray
) -> None:
    generator = np.random.default_rng(0)
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif"):
        whole = np.frombuffer(save(photo, tmp_path / f"a.{suffix}").read_bytes(), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            where = generator.integers(0, min(len(damaged), 400), 6)
            damaged[where] = generator.integers(0, 256, 6)
            path = tmp_path / f"b.{suffix}"
            path.write_bytes(damaged.tobytes())
            for read in (read_image, read_mask):
                try:
                    read(path)
                except ValueError as error:
                    assert f"b.{suffix} must " in str(error)  # noqa: PT017 - not raised is fine too


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"a\.png must be a whole picture .* got an empty file"),
        (b"<!DOCTYPE html><html>not found</html>", r"a\.png must be .* got something else"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "got a Git LFS pointer"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "got something else"),
    ],
    ids=["empty", "text", "pointer", "postscript"],
)
def test_foreign_files_are_refused_by_name(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=match):
            read(tmp_path / "a.png")


def test_an_avif_file_with_a_broken_box_is_refused(tmp_path: Path, photo: np.ndarray) -> None:
    """Found by fuzzing: its decoder raises RuntimeError."""
    path = save(photo, tmp_path / "a.avif")
    path.write_bytes(path.read_bytes().replace(b"pitm", b"itm\0"))
    with pytest.raises(ValueError, match=r"a\.avif must be a whole picture .* got 'Failed to dec"):
        read_image(path)


def test_a_jpeg2000_box_that_reaches_beyond_any_file_is_refused(
    tmp_path: Path, photo: np.ndarray
) -> None:
    """Found by fuzzing: the reader seeks there, which looked like a fault of the disk."""
    path = save(photo, tmp_path / "a.jp2")
    path.write_bytes(path.read_bytes().replace(b"\0\0\0\x14ftyp", b"\0\0\0\x01ftyp"))
    with pytest.raises(ValueError, match=r"a\.jp2 must be a whole picture .* got '.*Invalid arg"):
        read_image(path)


def test_a_header_that_claims_30000_pixels_a_side_is_refused_at_once(tmp_path: Path) -> None:
    path = save(np.zeros((1, 1), np.uint8), tmp_path / "a.png")
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=r"a\.png must have at most \d+ pixels, got more"):
            read(path)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
def test_a_picture_as_thin_as_a_line_is_read(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", size, (1, 2, 3)).save(path)
    assert read_image(path).shape == (size[1], size[0], 3)


def test_missing_files_and_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.png must exist"):
        read_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="got a folder"):
        read_mask(tmp_path)


@pytest.mark.parametrize("limit", [3000, 1000], ids=["warning", "error"])
def test_decompression_bombs_are_refused_in_one_line(
    tmp_path: Path, photo: np.ndarray, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    path = save(photo, tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for read in (read_image, read_mask):
        with pytest.raises(ValueError, match=f"at most {limit} pixels, got more"):
            read(path)


# --- layers ---------------------------------------------------------------------------------------


def test_layers_keep_the_files_own_alpha_upright(tmp_path: Path) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(np.ascontiguousarray(np.rot90(rgba)), tmp_path / "a.png", exif=exif)
    layers = read_layers(path)
    np.testing.assert_array_equal(layers.transparent, rgba)
    np.testing.assert_array_equal(layers.image, read_image(path))


def test_broken_exif_beside_transparency_is_ignored(tmp_path: Path) -> None:
    """The file was once opened a second time, by a reader that trusts its EXIF data."""
    rgba = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    path = save(rgba, tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(read_layers(path).transparent, rgba)


def test_sixteen_bit_grey_with_a_transparent_level_is_opaque(tmp_path: Path) -> None:
    path = save(np.array([[0, 3000, 65535]], np.uint16), tmp_path / "a.png", transparency=3000)
    layers = read_layers(path)
    assert layers.transparent is None
    assert layers.image[0, :, 0].tolist() == [0, 12, 255]


# --- squares --------------------------------------------------------------------------------------


def test_the_box_is_the_largest_square() -> None:
    assert crop_box(640, 480, rng=None) == (80, 0, 480)
    assert crop_box(480, 640, rng=None) == (0, 80, 480)
    assert crop_box(64, 64, rng=np.random.default_rng(0)) == (0, 0, 64)
    drawn = {crop_box(7, 4, rng=np.random.default_rng(seed)) for seed in range(100)}
    assert drawn == {(left, 0, 4) for left in range(4)}
    assert crop_box(4, 7, rng=np.random.default_rng(1))[0] == 0


def test_a_box_of_the_right_size_is_cut_out_bit_identical(photo: np.ndarray) -> None:
    for source in (photo, Image.fromarray(photo)):
        cut = resize_image(source, box=(10, 0, 48), size=48, flip=False)
        np.testing.assert_array_equal(cut, photo[:, 10:58])
        mirrored = resize_image(source, box=(10, 0, 48), size=48, flip=True)
        np.testing.assert_array_equal(mirrored, photo[:, 10:58][:, ::-1])
        assert mirrored.flags.writeable


def test_shrinking_averages_instead_of_dropping_pixels() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resize_image(stripes, box=(0, 0, 64), size=16, flip=False)
    assert np.abs(small[:, 2:-2].astype(int) - 128).max() <= 2


def test_a_mask_follows_its_picture(hole: np.ndarray) -> None:
    picture = (hole[..., None] * 255).repeat(3, axis=2).astype(np.uint8)
    for flip in (False, True):
        for size in (24, 48, 96):
            image = resize_image(picture, box=(9, 0, 48), size=size, flip=flip)
            mask = resize_mask(hole, box=(9, 0, 48), size=size, flip=flip)
            assert mask.dtype == np.uint8
            assert mask.shape == (size, size)
            assert np.mean((image[..., 0] > 127) != mask) < 0.02
            assert mask.flags.c_contiguous


def test_half_covered_pixels_are_hole() -> None:
    mask = np.array([[1, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.uint8)
    small = resize_mask(mask, box=(0, 0, 4), size=2, flip=False)
    assert small.tolist() == [[1, 1], [0, 0]]
    assert resize_mask(np.ones((3, 3), np.uint8), box=(0, 0, 3), size=2, flip=True).min() == 1


# --- masks ----------------------------------------------------------------------------------------


def as_palette(hole: np.ndarray, colours: list[int]) -> Image.Image:
    image = Image.fromarray(hole, "L").convert("P")
    image.putdata(hole.ravel().tolist())
    image.putpalette(colours)
    return image


def with_alpha(hole: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    rgba = np.empty((*hole.shape, 4), np.uint8)
    rgba[..., :3] = colour
    rgba[..., 3] = hole * 255
    return rgba


MASKS = {
    "0/1": lambda m: m,
    "0/255": lambda m: m * np.uint8(255),
    "0/128": lambda m: m * np.uint8(128),
    "mode 1": lambda m: Image.fromarray(m * np.uint8(255)).convert("1"),
    "16-bit 0/1": lambda m: m.astype(np.uint16),
    "16-bit 0/255": lambda m: m * np.uint16(255),
    "16-bit 0/65535": lambda m: m * np.uint16(65535),
    "grey with alpha": lambda m: np.stack([m * 255, np.full_like(m, 255)], -1).astype(np.uint8),
    "alpha in LA": lambda m: np.stack([np.zeros_like(m), m * np.uint8(255)], -1),
    "rgb": lambda m: (m[..., None] * 255).repeat(3, 2).astype(np.uint8),
    "rgb 0/1": lambda m: m[..., None].repeat(3, 2),
    "red on black": lambda m: m[..., None] * np.array([255, 0, 0], np.uint8),
    "dark blue on black": lambda m: m[..., None] * np.array([0, 0, 128], np.uint8),
    "palette red": lambda m: as_palette(m, [0, 0, 0, 128, 0, 0]),
    "palette white": lambda m: as_palette(m, [0, 0, 0, 255, 255, 255]),
    "palette 0/1": lambda m: as_palette(m, [0, 0, 0, 1, 1, 1]),
    "palette lost": lambda m: as_palette(m, [0, 0, 0, 0, 0, 0]),
    "palette white first": lambda m: as_palette(1 - m, [255, 255, 255, 0, 0, 0]),
    "white paint on nothing": lambda m: with_alpha(m, (255, 255, 255)),
    "black paint on nothing": lambda m: with_alpha(m, (0, 0, 0)),
    "red paint on nothing": lambda m: with_alpha(m, (255, 0, 0)),
    "opaque rgba": lambda m: np.concatenate(
        [(m[..., None] * 255).repeat(3, 2), np.full((*m.shape, 1), 255)], -1
    ).astype(np.uint8),
    "white and black paint on nothing": lambda m: np.stack(
        [m * 255, m * 255, m * 255, np.where(np.arange(m.shape[1]) < 50, 255, m * 255)], -1
    ).astype(np.uint8),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_understood_as_people_save_them(
    tmp_path: Path, hole: np.ndarray, name: str
) -> None:
    mask = read_mask(save(MASKS[name](hole), tmp_path / "mask.png"))
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, hole)


@pytest.mark.parametrize("colour", [(255, 255, 255), (255, 0, 0), (0, 200, 80)], ids=str)
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_noise_is_cut_away(
    tmp_path: Path, hole: np.ndarray, colour: tuple[int, int, int], quality: int
) -> None:
    large = hole.repeat(4, 0).repeat(4, 1)
    painted = (large[..., None] * np.array(colour)).astype(np.uint8)
    mask = read_mask(save(painted, tmp_path / "mask.jpg", quality=quality))
    assert np.mean(mask != large) < 0.01


@pytest.mark.parametrize(("scale", "dtype"), [(1, np.uint8), (1, np.uint16), (257, np.uint16)])
def test_soft_edges_are_cut_in_the_middle(tmp_path: Path, scale: int, dtype: type) -> None:
    ramp = np.clip(np.arange(-100, 140, 12), 0, 128)
    ramp = np.concatenate([ramp, np.arange(140, 256, 12)])
    line = np.concatenate([np.zeros(100), ramp, np.full(60, 255), ramp[::-1], np.zeros(100)])
    grey = np.tile(line.astype(dtype), (20, 1)) * dtype(scale)
    path = save(grey, tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(path), grey >= 128 * scale)


REFUSED = {
    "black": (lambda m: m * np.uint8(0), "no hole: it is all black"),
    "white": (lambda m: m * np.uint8(0) + np.uint8(255), "nothing to keep"),
    "one pixel": (lambda m: m[:1, :1] * np.uint8(255), "nothing to keep"),
    "transparent": (lambda m: with_alpha(m * 0, (0, 0, 0)), "no hole"),
    "labels": (lambda m: m + (np.arange(64) > 45).astype(np.uint8) * m, "more than two levels"),
    "trimap": (
        lambda m: np.where(m == 1, 255, np.where(np.arange(64) > 30, 128, 0)).astype(np.uint8),
        "half-tones on",
    ),
    "red on white": (
        lambda m: np.where(m[..., None] == 1, (255, 0, 0), (255, 255, 255)).astype(np.uint8),
        "several colours",
    ),
    "two colours": (
        lambda m: m[..., None] * np.where(np.arange(64)[:, None] < 32, (255, 0, 0), (0, 255, 0)),
        "several colours",
    ),
    "32-bit": (lambda m: m.astype(np.int32) * 100000, "32-bit values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_mask_is_refused_in_one_line(
    tmp_path: Path, hole: np.ndarray, name: str
) -> None:
    make, match = REFUSED[name]
    array = make(hole)
    array = array.astype(np.uint8) if array.dtype == np.int64 else array
    path = save(array, tmp_path / ("mask.tif" if array.dtype == np.int32 else "mask.png"))
    with pytest.raises(ValueError, match=rf"mask\.\w+ must be a mask, .* got .*{match}") as caught:
        read_mask(path)
    assert "\n" not in str(caught.value)


def test_photographs_are_refused_as_masks(tmp_path: Path, photo: np.ndarray) -> None:
    with pytest.raises(ValueError, match="several colours"):
        read_mask(save(photo, tmp_path / "a.png"))
    with pytest.raises(ValueError, match=r"half-tones on .* Is it a photograph"):
        read_mask(save(Image.fromarray(photo).convert("L"), tmp_path / "b.png"))
    erased = np.concatenate([photo, photo[..., :1] // 128 * 255], axis=2)
    with pytest.raises(ValueError, match="may mean hole or keep"):
        read_mask(save(erased, tmp_path / "c.png"))


def test_the_noise_of_a_black_jpeg_is_no_hole(tmp_path: Path) -> None:
    dark = np.zeros((32, 32), np.uint8)
    dark[::8, ::8] = 12
    with pytest.raises(ValueError, match="no hole"):
        read_mask(save(dark, tmp_path / "a.jpg", quality=90))


def test_a_small_hole_in_a_large_mask_is_found(tmp_path: Path) -> None:
    rgb = np.zeros((2000, 2000, 3), np.uint8)
    rgb[1001:1003, 1501:1504] = (255, 0, 0)
    assert read_mask(save(rgb, tmp_path / "a.png")).sum() == 6


@needs_data
def test_real_masks_are_read_at_their_own_size() -> None:
    paths = sorted((DATA / "inpaint_pairs").rglob("*mask*.png"))
    assert paths
    for path in paths:
        mask = read_mask(path)
        assert mask.shape == Image.open(path).size[::-1]
        grey = np.asarray(Image.open(path).convert("RGB").convert("L"))
        assert np.mean(mask != (grey > 127)) < 0.001, path


@needs_data
def test_real_photographs_are_pictures_and_not_masks() -> None:
    paths = sorted((DATA / "coco_real" / "images").glob("*.jpg"))[:60]
    assert paths
    num_refused = 0
    for path in paths:
        assert read_image(path).ndim == 3
        try:
            read_mask(path)
        except ValueError:
            num_refused += 1
    # One is a silhouette before a bright sky: nothing tells it from a mask.
    assert num_refused >= len(paths) - 1
