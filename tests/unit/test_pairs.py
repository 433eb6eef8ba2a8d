from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from inpainting import pairs
from inpainting.images import read_image

HOLE = np.s_[20:45, 30:61]


@pytest.fixture
def job(tmp_path: Path) -> pairs.Job:
    image = np.random.default_rng(0).integers(0, 256, (70, 94, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "cat.png")
    mask = np.zeros((70, 94), dtype=np.uint8)
    mask[HOLE] = 255
    Image.fromarray(mask).save(tmp_path / "cat_mask.png")
    return pairs.Job(tmp_path / "cat.png", tmp_path / "cat_mask.png", prefix="")


def read(job: pairs.Job, *, invert_mask: bool = False, mask_grow: int = 0) -> pairs.Picture:
    return pairs.read_picture(job, invert_mask=invert_mask, mask_grow=mask_grow)


def written(job: pairs.Job, picture: pairs.Picture, *, mask_blur: int = 0) -> Image.Image:
    """Write a fill of mid-grey, and return what is in the file."""
    result = picture.image.copy()
    result[picture.mask == 1] = 128
    paths = pairs.write_results(
        [result], picture=picture, output_dir=job.image_path.parent / "out", prefix="",
        mask_blur=mask_blur,
    )  # fmt: skip
    assert [path.name for path in paths] == ["inpainted.png", "comparison.png"]
    return Image.open(paths[0])


# Finding


@pytest.mark.parametrize("in_one_folder", [True, False])
def test_pictures_find_their_masks_by_name(
    job: pairs.Job, tmp_path: Path, in_one_folder: bool, caplog: pytest.LogCaptureFixture
) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    masks = images if in_one_folder else masks
    for name in ("cat.png", "dog.JPG", "alone.png", ".hidden.png", "notes.txt"):
        images.mkdir(exist_ok=True)
        shutil.copy(job.image_path, images / name)
    for name in ("cat_mask.png", "dog_mask.webp", "stray_mask.png"):
        masks.mkdir(exist_ok=True)
        shutil.copy(job.mask_path, masks / name)
    jobs = pairs.find_jobs(images, masks)

    assert [(j.image_path.name, j.mask_path.name, j.prefix) for j in jobs] == [
        ("cat.png", "cat_mask.png", "cat_"), ("dog.JPG", "dog_mask.webp", "dog_"),
    ]  # fmt: skip
    assert caplog.messages == [
        "left out, no mask for: alone.png.", "left out, no picture for: stray_mask.png.",
    ]  # fmt: skip


def test_two_files_are_a_pair_whatever_their_names(job: pairs.Job) -> None:
    assert pairs.find_jobs(job.image_path, job.mask_path) == [job]


def test_what_makes_no_pair_is_refused(job: pairs.Job, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--input_mask must exist, got nothing\.png"):
        pairs.find_jobs(job.image_path, Path("nothing.png"))
    with pytest.raises(ValueError, match="two files or two folders"):
        pairs.find_jobs(job.image_path, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must share names.*got no pair in"):
        pairs.find_jobs(tmp_path, tmp_path / "empty")


def test_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("cat.png", "cat.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"more than the suffix, got \S*cat\.jpg and cat\.png"):
        pairs.by_stem(tmp_path)


# Reading


def test_mask_is_inverted_then_grown(job: pairs.Job) -> None:
    assert np.all(read(job).mask[HOLE] == 1)
    assert read(job).mask.sum() == 25 * 31
    grown = read(job, mask_grow=2).mask
    assert np.all(grown[18:47, 28:63] == 1)
    assert grown.sum() == 29 * 35
    shrunk = read(job, invert_mask=True, mask_grow=2).mask
    assert np.all(shrunk[22:43, 32:59] == 0)
    assert (shrunk == 0).sum() == 21 * 27


@pytest.mark.parametrize(
    ("num_rows", "invert_mask", "advice"),
    [(90, False, None), (91, False, "add --invert_mask"), (9, True, "drop --invert_mask")],
)
def test_a_hole_over_nearly_everything_is_warned_about(
    tmp_path: Path, num_rows: int, invert_mask: bool, advice: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    mask = np.zeros((100, 100), dtype=np.uint8)
    mask[:num_rows] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.new("RGB", (100, 100)).save(tmp_path / "test.png")
    job = pairs.Job(tmp_path / "test.png", tmp_path / "mask.png", prefix="")
    read(job, invert_mask=invert_mask)

    assert len(caplog.messages) == (advice is not None), caplog.messages
    if advice:
        assert "mask.png: the hole covers 91 % of the picture." in caplog.messages[0]
        assert advice in caplog.messages[0]


def test_a_mask_of_another_picture_is_refused_with_its_name(job: pairs.Job) -> None:
    Image.open(job.mask_path).rotate(90, expand=True).save(job.mask_path)
    with pytest.raises(ValueError, match=r"cat_mask\.png: .*a mask of 70x94 for a picture of 94x"):
        read(job)


# Writing


def test_a_rotated_photograph_comes_out_upright(job: pairs.Job, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photograph.jpg"
    Image.open(job.image_path).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    photograph = pairs.Job(path, job.mask_path, prefix="")
    result = written(photograph, picture := read(photograph))
    known = picture.mask == 0

    assert result.size == (94, 70)
    assert np.array_equal(np.asarray(result)[known], read_image(path)[known])
    assert 0x0112 not in result.getexif()


def test_colour_profile_goes_with_the_colours(job: pairs.Job) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.open(job.image_path)
    image.load()
    image.save(job.image_path, icc_profile=profile)
    assert written(job, read(job)).info["icc_profile"] == profile

    image.convert("L").save(job.image_path, icc_profile=profile)
    assert "icc_profile" not in written(job, read(job)).info, "the profile isn't one of RGB"


def test_transparency_and_the_colours_under_it_are_kept(job: pairs.Job) -> None:
    rgba = np.random.default_rng(1).integers(0, 256, (70, 94, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(job.image_path)
    result = np.asarray(written(job, read(job), mask_blur=3))
    far = np.ones((70, 94), dtype=bool)
    far[17:48, 27:64] = False

    assert np.array_equal(result[..., 3], rgba[..., 3])
    assert np.array_equal(result[far], rgba[far])
    assert np.all(result[HOLE][..., :3] == 128)


def test_a_hole_that_was_cut_out_becomes_opaque(job: pairs.Job) -> None:
    rgba = np.random.default_rng(1).integers(1, 256, (70, 94, 4), dtype=np.uint8)
    rgba[HOLE] = 0
    Image.fromarray(rgba).save(job.image_path)
    result = np.asarray(written(job, picture := read(job)))
    known = picture.mask == 0

    assert np.all(result[HOLE][..., 3] == 255)
    assert np.array_equal(result[known], rgba[known])


def test_comparison_stands_side_by_side_and_stays_small() -> None:
    panels = [np.full((30, 20, 3), level, dtype=np.uint8) for level in (10, 20, 30)]
    comparison = pairs.compare(panels)
    assert comparison.shape == (30, 3 * 20 + 2 * pairs.GAP_PX, 3)
    assert [comparison[0, x, 0] for x in (0, 19, 20, 28, -1)] == [10, 10, 255, 20, 30]

    large = [np.zeros((500, 4000, 3), dtype=np.uint8)] * 2
    assert pairs.compare(large).shape == (128, 2 * pairs.PANEL_PX + pairs.GAP_PX, 3)
