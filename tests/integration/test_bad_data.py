"""What the command does with bad records and pictures: leave out, refuse, or list them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny
from tests.commands import run, run_typed


@pytest.fixture
def spoilt(tmp_path: Path, flags: list[str]) -> list[str]:
    """The usual flags with data of their own, of which one record and one picture are bad."""
    folder = Path(shutil.copytree(tiny.coco_folder(), tmp_path / "it's 数据"))
    ann_file = folder / "annotations" / "instances.json"
    content = json.loads(ann_file.read_text())
    content["annotations"][0]["segmentation"] = [[1, 1, float("nan"), 1, 5, 4]]
    ann_file.write_text(json.dumps(content))
    bad = sorted((folder / "images").iterdir())[4]
    bad.write_bytes(bad.read_bytes()[:300])
    named = ["--image_dir", str(folder / "images"), "--ann_file", str(ann_file)]
    return [*flags, "--caption_file", str(folder / "annotations" / "captions.json"), *named]


def test_check_lists_every_fault_and_draws_samples(spoilt: list[str], output_dir: Path) -> None:
    code, stdout, stderr = run_typed(
        ["train_lightning.py", *spoilt, "--check", "--output_dir", output_dir]
    )
    assert code == 1, stdout + stderr
    assert stderr == ""
    assert "1 x annotations: the coordinates of a polygon must be finite" in stdout
    assert "1 x pictures: a file must be a whole picture" in stdout
    folder = output_dir / "data_check"
    assert [path.name for path in output_dir.iterdir()] == ["data_check"]
    assert sorted(path.name for path in folder.iterdir()) == ["faults.json", "samples.png"]
    report = json.loads((folder / "faults.json").read_text())
    assert len(report["faults"]) == 2
    assert report["summary"]["num_rows"]["pictures"] == tiny.NUM_SCENES
    assert len(report["summary"]["samples"]) == tiny.NUM_SCENES - 1
    assert Image.open(folder / "samples.png").height > 11 * 192


def test_check_of_sound_data_ends_with_0(flags: list[str], output_dir: Path) -> None:
    result = run([*flags, "--check"], output_dir=output_dir)
    assert result.code == 0, result.output
    report = json.loads((output_dir / "data_check" / "faults.json").read_text())
    assert report["faults"] == []
    shown = {sample["image_id"] for sample in report["summary"]["samples"]}
    assert len(shown) == tiny.NUM_SCENES


def test_too_much_bad_data_ends_the_start_in_one_line(spoilt: list[str], output_dir: Path) -> None:
    result = run(spoilt, output_dir=output_dir)
    assert result.code == 2, result.output
    assert result.output.splitlines()[-1].startswith("error: at most 0.01 of the annotations may")
    assert not output_dir.exists()


def test_a_bad_picture_is_named_once_and_training_goes_on(
    spoilt: list[str], output_dir: Path
) -> None:
    result = run(
        [*spoilt, "--max_bad_fraction", "0.2", "--num_epochs", "2", "--val_split", "0",
         "--num_workers", "2"],
        output_dir=output_dir,
    )  # fmt: skip
    assert result.code == 0, result.output
    assert result.output.count("left out: id") == 1, result.output
    assert result.output.count("1 of 12 pictures can't be read") == 1, result.output
    assert result.output.count("must be a whole picture") == 1, "named again by the loaders"


def test_strict_data_refuses_a_bad_row_at_the_start(spoilt: list[str], output_dir: Path) -> None:
    result = run([*spoilt, "--strict_data", "--max_bad_fraction", "1"], output_dir=output_dir)
    assert result.code == 2, result.output
    assert "error: --strict_data: every row must be sound, got 1 of" in result.output
    assert not output_dir.exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_strict_data_ends_a_run_whose_picture_goes_bad(
    flags: list[str], tmp_path: Path, output_dir: Path, num_workers: int
) -> None:
    folder = Path(shutil.copytree(tiny.coco_folder() / "images", tmp_path / "images"))
    for path in folder.iterdir():
        path.chmod(0o644)
    code = (
        "import sys, pathlib, train_lightning\n"
        "from inpainting import inspection\n"
        "tried = inspection.try_pictures\n"
        "def spoil(index):\n"
        "    result = tried(index)\n"
        "    [p.write_bytes(b'') for p in pathlib.Path(index.image_dir).iterdir()]\n"
        "    return result\n"
        "inspection.try_pictures = spoil\n"
        "sys.exit(train_lightning.main(sys.argv[1:]))\n"
    )
    status, stdout, stderr = run_typed(
        ["-c", code, *flags, "--image_dir", folder, "--strict_data", "--num_workers", num_workers,
         "--output_dir", output_dir]
    )  # fmt: skip
    assert status == 2, stdout + stderr
    (line,) = [line for line in stdout.splitlines() if "error: " in line]
    assert f"error: --strict_data: {folder}" in line
    assert "got an empty file" in line
    assert "Traceback" not in stdout + stderr
