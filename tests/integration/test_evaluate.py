from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.image import fid, lpip

from demo.random_base import write_random_base
from demo.scenes import write_scenes
from inpainting.benchmark_holes import HOLE_KINDS, draw_benchmark_hole
from inpainting.images import read_image
from inpainting.sampling import FILL_VERSION
from model import build_controlnet, load_base
from tools import evaluate, perceptual

SIZE_PX = 64
CANDIDATES = [
    "ControlNet", "base, edge met", "base alone", "Telea", "Navier-Stokes", "mean colour",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, a ControlNet that changes something, and three scenes."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_random_base(folder / "base")
    base = load_base(str(folder / "base"))
    torch.manual_seed(0)
    controlnet = build_controlnet(base.unet, stride=base.stride)
    for parameter in controlnet.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    torch.save(controlnet.state_dict(), folder / "controlnet.pth")
    write_scenes(folder / "scenes", num_scenes=3, size=SIZE_PX, seed=3)
    return folder


@pytest.fixture(autouse=True)
def own_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


def command(place: Path, output_dir: Path, *flags: str, image_dir: Path | None = None) -> list[str]:
    scenes = place / "scenes"
    return [
        "--checkpoint_path", str(place / "controlnet.pth"),
        "--pretrained_model_name_or_path", str(place / "base"),
        "--image_dir", str(image_dir or scenes / "images"),
        "--ann_file", str(scenes / "annotations" / "instances.json"),
        "--caption_file", str(scenes / "annotations" / "captions.json"),
        "--num_samples", "2", "--num_inference_steps", "2", "--image_size", str(SIZE_PX),
        "--device", "cpu", "--output_dir", str(output_dir), *flags,
    ]  # fmt: skip


def test_every_hole_and_candidate_gets_its_line_and_its_picture(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(command(place, tmp_path)) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert results["settings"]["fill_version"] == FILL_VERSION

    assert list(results["summaries"]) == list(HOLE_KINDS)
    for kind, of_kind in results["summaries"].items():
        assert [summary["candidate"] for summary in of_kind] == CANDIDATES
        assert all(summary["num_changed_known"] == 0 for summary in of_kind)
        assert Image.open(tmp_path / f"sheet_{kind}.png").width > 7 * SIZE_PX
        ours, base = (summary["means"] for summary in of_kind[:2])
        assert ours["psnr_hole"] != base["psnr_hole"], "the ControlNet changes nothing"
        # The mean of samples is closer to anything than the samples are.
        assert ours["psnr_hole_of_mean"] > ours["psnr_hole"]
    table = (tmp_path / "results.md").read_text("utf-8").split("\n\n")[1]
    assert table in printed


def test_no_candidate_sees_the_truth_in_the_hole(place: Path, tmp_path: Path) -> None:
    """Noise in the hole's place: every fill has the same bits."""
    flags = ("--hole_kinds", "thick")
    assert evaluate.main(command(place, tmp_path / "truth", *flags)) == 0
    noisy_dir = tmp_path / "images"
    noisy_dir.mkdir()
    rng = np.random.default_rng(0)
    for path in (place / "scenes" / "images").iterdir():
        mask = draw_benchmark_hole("thick", size=SIZE_PX, image_id=int(path.stem), object_masks=[])
        assert mask is not None
        image = read_image(path)
        noise = rng.integers(0, 256, image.shape, dtype=np.uint8)
        noisy = np.where(mask[..., None] == 1, noise, image)
        Image.fromarray(noisy).save(noisy_dir / path.name)
    again = command(place, tmp_path / "noise", *flags, image_dir=noisy_dir)
    assert evaluate.main(again) == 0

    for path in sorted((tmp_path / "truth" / "pictures" / "thick").iterdir()):
        other = tmp_path / "noise" / "pictures" / "thick" / path.name
        is_equal = np.array_equal(read_image(path), read_image(other))
        assert is_equal == (not path.stem.endswith("_truth")), path.name


def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_numbers(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate.main(command(place, tmp_path / "straight", "--num_pictures", "2")) == 0
    num_cases, stopped = 0, tmp_path / "stopped"
    build_case = evaluate.build_case

    def stop_in_the_middle(*args: object, **kwargs: object) -> object:
        nonlocal num_cases
        num_cases += 1
        if num_cases == 4:
            raise KeyboardInterrupt
        return build_case(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "build_case", stop_in_the_middle)
    assert evaluate.main(command(place, stopped, "--num_pictures", "2")) == 130
    with (stopped / "scores.jsonl").open("a") as file:
        file.write('[{"kind": "thin", "image_')  # as a kill within the write leaves it
    num_cases = -100
    assert evaluate.main(command(place, stopped, "--num_pictures", "2")) == 0

    assert num_cases == -100 + 2 * len(HOLE_KINDS) - 3, "what was done is not done again"
    expected = (tmp_path / "straight" / "results.json").read_text("utf-8")
    assert (stopped / "results.json").read_text("utf-8") == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_samples", "3"], "another num_samples (2 there, 3 now)"),
        (["--image_size", "72"], "--image_size must be a multiple of 16"),
        (["--num_pictures", "0"], "--num_pictures must be at least 1, got 0"),
        (["--perceptual"], "requirements-metrics.txt"),
        (["--checkpoint_path", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_what_cannot_work_is_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:

    if flags == ["--num_samples", "3"]:
        assert evaluate.main(command(place, tmp_path / "e", "--hole_kinds", "thin")) == 0
        flags, tmp_path = [*flags, "--hole_kinds", "thin"], tmp_path / "e"
    capsys.readouterr()
    assert evaluate.main(command(place, tmp_path, *flags)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert message in line


def test_samples_that_fit_into_no_memory_are_one_line(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def draw(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("inpainting.sampling.draw_fills", draw)
    assert evaluate.main(command(place, tmp_path)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--num_samples must fit into the device's memory, got 2 at 64 px" in line


def test_the_settings_name_the_device_and_the_precision_that_were_taken(
    place: Path, tmp_path: Path
) -> None:
    flags = ("--hole_kinds", "thick", "--num_pictures", "1", "--precision", "auto")
    assert evaluate.main(command(place, tmp_path, *flags)) == 0
    settings = json.loads((tmp_path / "settings.json").read_text("utf-8"))
    assert (settings["device"], settings["precision"]) == ("cpu", "32")


class CountingMetric:
    """Stands in for torchmetrics' LPIPS and FID, whose networks would be fetched."""

    sizes: ClassVar[list[int]] = []

    def __init__(self, **_: object) -> None:
        self.count = 0

    def to(self, device: torch.device) -> CountingMetric:
        return self

    def update(self, pictures: torch.Tensor, *_: object, **__: object) -> None:
        self.sizes.append(len(pictures))
        self.count += len(pictures)

    def compute(self) -> float:
        return self.count


@pytest.mark.parametrize("num_pictures", [1, 3])
def test_perceptual_metrics_take_a_few_pictures_at_once(
    num_pictures: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CountingMetric, "sizes", [])
    monkeypatch.setattr(perceptual, "PACKAGES", ())
    monkeypatch.setattr(perceptual, "NUM_AT_ONCE", 2)
    monkeypatch.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", CountingMetric)
    monkeypatch.setattr(fid, "FrechetInceptionDistance", CountingMetric)
    flags = ("--hole_kinds", "thick", "--num_pictures", str(num_pictures), "--perceptual")

    assert evaluate.main(command(place, tmp_path, *flags)) == 0
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))["perceptual"]["thick"]
    expected = {"lpips": num_pictures, "fid": 2 * num_pictures}  # the truth's too
    if num_pictures == 1:
        del expected["fid"]  # a distance between two clouds of one point
    assert found == dict.fromkeys(CANDIDATES, expected)
    assert set(CountingMetric.sizes) == {1, 2}.intersection({num_pictures, 1, num_pictures - 1})


def test_a_second_controlnet_is_measured_beside_the_first(place: Path, tmp_path: Path) -> None:
    flags = ("--hole_kinds", "thick", "--num_pictures", "1")
    other = torch.load(place / "controlnet.pth", weights_only=True)
    torch.save({name: 1.5 * tensor for name, tensor in other.items()}, tmp_path / "other.pth")
    for name in ("controlnet.pth", "other.pth"):
        weights = str((place if name == "controlnet.pth" else tmp_path) / name)
        output_dir = tmp_path / f"with {name}"
        assert evaluate.main(command(place, output_dir, *flags, "--compare_with", weights)) == 0
        results = json.loads((output_dir / "results.json").read_text("utf-8"))
        first, second = results["summaries"]["thick"][:2]
        assert (first["candidate"], second["candidate"]) == ("ControlNet", "second ControlNet")
        assert (first["means"] == second["means"]) == (name == "controlnet.pth")


def test_a_torn_picture_is_left_out_and_only_torn_ones_are_a_mistake(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = shutil.copytree(place / "scenes" / "images", tmp_path / "images")
    first, *others = sorted(images.iterdir())
    flags = ("--hole_kinds", "thick")
    first.write_bytes(first.read_bytes()[:100])
    assert evaluate.main(command(place, tmp_path / "e", *flags, image_dir=images)) == 0
    assert capsys.readouterr().err.count(f"left out: {first}") == 1
    results = json.loads((tmp_path / "e" / "results.json").read_text("utf-8"))
    assert results["summaries"]["thick"][0]["num_pictures"] == len(others)
    for path in others:
        path.write_bytes(path.read_bytes()[:100])
    assert evaluate.main(command(place, tmp_path / "f", *flags, image_dir=images)) == 2
    assert "error: --image_dir must hold a readable picture" in capsys.readouterr().err


def test_without_annotations_there_are_no_object_holes(place: Path, tmp_path: Path) -> None:
    flags = command(place, tmp_path, "--num_pictures", "1")
    for name in ("--ann_file", "--caption_file"):
        position = flags.index(name)
        del flags[position : position + 2]
    assert evaluate.main(flags) == 0
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert list(results["summaries"]) == ["thin", "medium", "thick"]
