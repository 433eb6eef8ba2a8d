from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

import infer
import pipeline
from demo.defaults import BASE_DIR
from demo.random_base import write_random_base
from inpainting.checkpoints import base_hash, write_final_model
from inpainting.flags import DEFAULT_BASE
from inpainting.images import read_image, read_mask
from inpainting.infer_flags import build_parser
from inpainting.pairs import GAP_PX, find_jobs
from inpainting.record import InpaintingRecord
from model import build_controlnet, load_base
from tests import commands

ROOT = Path(__file__).parents[2]
PAIRS = ROOT.parent / "shared" / "data" / "inpaint_pairs"


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="module")
def run_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("outputs") / "run"
    write_model(run_dir / "final_model", base_dir=base_dir, base_name="tiny")
    arguments = {"pretrained_model_name_or_path": str(base_dir), "base_config": None}
    (run_dir / "run.json").write_text(json.dumps({"arguments": arguments}))
    return run_dir


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    image = np.random.default_rng(0).integers(0, 256, (70, 94, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "test.png")
    Image.fromarray(hole(70, 94) * np.uint8(255)).save(tmp_path / "mask.png")
    return tmp_path / "test.png", tmp_path / "mask.png"


@pytest.fixture(autouse=True)
def _keep_signal_handlers() -> Iterator[None]:
    earlier = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in earlier.items():
        signal.signal(signum, handler)


def write_model(folder: Path, *, base_dir: Path, base_name: str) -> None:
    """Write a ControlNet that says something: its zero convolutions are off zero."""
    base = load_base(str(base_dir))
    controlnet = build_controlnet(base.unet, stride=base.stride)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in controlnet.named_parameters():
        if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond")):
            parameter.data.normal_(0.0, 0.3, generator=generator)
    record = InpaintingRecord(
        image_size=64, vae_stride=base.stride, prediction_type=base.prediction_type,
        base=base_name, base_unet_sha256=base_hash(base.unet), is_average=False, global_step=2,
    )  # fmt: skip
    write_final_model(folder, controlnet=controlnet, record=record, training={})


def hole(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[20:45, 30:61] = 1
    return mask


def command(run_dir: Path, pair: tuple[Path, Path], *flags: str) -> list[str]:
    return [
        "--checkpoint_path", str(run_dir / "final_model" / "controlnet.pth"),
        "--input_image", str(pair[0]), "--input_mask", str(pair[1]),
        "--output_dir", str(pair[0].parent / "out"), "--num_inference_steps", "2",
        "--device", "cpu", *flags,
    ]  # fmt: skip


def read_result(pair: tuple[Path, Path], name: str = "inpainted.png") -> np.ndarray:
    return np.asarray(Image.open(pair[0].parent / "out" / name))


def error_line(capfd: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("infer.py")]
    assert len(lines) == 1, lines
    return lines[0]


# What it writes


def test_known_pixels_keep_their_bits_and_the_size(run_dir: Path, pair: tuple[Path, Path]) -> None:
    assert infer.main(command(run_dir, pair)) == 0
    result, image = read_result(pair), np.asarray(Image.open(pair[0]))
    known = hole(70, 94) == 0

    assert result.shape == image.shape
    assert np.array_equal(result[known], image[known])
    assert (result != image)[~known].mean() > 0.9
    comparison = read_result(pair, "comparison.png")
    assert comparison.shape == (70, 3 * 94 + 2 * GAP_PX, 3)
    assert np.array_equal(comparison[:, :94], image)
    assert np.array_equal(comparison[:, -94:], result)
    assert sorted(p.name for p in (pair[0].parent / "out").iterdir()) == [
        "comparison.png",
        "inpainted.png",
    ]


def test_a_result_does_not_depend_on_how_many_are_asked_for(
    run_dir: Path, pair: tuple[Path, Path]
) -> None:
    infer.main(command(run_dir, pair, "--seed", "5", "--num_images", "3"))
    of_three = [read_result(pair, f"inpainted{suffix}.png") for suffix in ("", "_1", "_2")]
    for i, expected in enumerate(of_three):
        infer.main(command(run_dir, pair, "--seed", str(5 + i)))
        assert np.array_equal(read_result(pair), expected), f"result {i}"

    assert not np.array_equal(of_three[0], of_three[1])


def test_transparency_and_the_colours_under_it_are_kept(
    run_dir: Path, pair: tuple[Path, Path]
) -> None:
    rgba = np.random.default_rng(1).integers(0, 256, (70, 94, 4), dtype=np.uint8)
    Image.fromarray(rgba).save(pair[0])
    assert infer.main(command(run_dir, pair, "--mask_blur", "3")) == 0
    result = read_result(pair)
    far = np.ones((70, 94), dtype=bool)
    far[17:48, 27:64] = False

    assert np.array_equal(result[..., 3], rgba[..., 3])
    assert np.array_equal(result[far], rgba[far])
    assert (result != rgba)[hole(70, 94) == 1, :3].mean() > 0.9


def test_inverted_and_grown_masks_move_what_is_known(
    run_dir: Path, pair: tuple[Path, Path]
) -> None:
    Image.fromarray((1 - hole(70, 94)) * np.uint8(255)).save(pair[1])
    infer.main(command(run_dir, pair, "--invert_mask", "--mask_grow", "2"))
    changed = (read_result(pair) != np.asarray(Image.open(pair[0]))).any(axis=-1)

    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (18, 46, 28, 62)


def test_half_precision_fills_about_the_same(run_dir: Path, pair: tuple[Path, Path]) -> None:
    infer.main(command(run_dir, pair))
    full = read_result(pair).astype(int)
    infer.main(command(run_dir, pair, "--precision", "bf16-mixed"))

    difference = np.abs(read_result(pair) - full)[hole(70, 94) == 1]
    assert 0 < difference.mean() < 20

    flags = command(run_dir, pair, "--precision", "bf16-mixed")
    pipeline, image_size = infer.load(build_parser().parse_args(flags))
    halves = [pipeline.unet.dtype, pipeline.controlnet.dtype]
    assert halves == [torch.bfloat16, torch.bfloat16]
    assert [pipeline.vae.dtype, pipeline.text_encoder.dtype] == [torch.float32, torch.float32]
    assert image_size == 64


# Folders


def test_folders_are_paired_by_name(
    run_dir: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    images, masks = pair[0].parent / "images", pair[0].parent / "masks"
    for folder in (images, masks):
        folder.mkdir()
    for name in ("cat.png", "dog.png", "alone.png"):
        shutil.copy(pair[0], images / name)
    for name in ("cat.png", "dog_mask.png", "stray.png"):
        shutil.copy(pair[1], masks / name)
    infer.main(command(run_dir, pair))
    expected = read_result(pair)
    shutil.rmtree(pair[0].parent / "out")
    flags = ["--input_image", str(images), "--input_mask", str(masks)]

    capfd.readouterr()
    assert infer.main(command(run_dir, pair, *flags)) == 0
    error = capfd.readouterr().err
    assert "no mask for: alone.png" in error
    assert "no picture for: stray.png" in error
    assert sorted(p.name for p in (pair[0].parent / "out").iterdir()) == [
        "cat_comparison.png", "cat_inpainted.png", "dog_comparison.png", "dog_inpainted.png",
    ]  # fmt: skip
    assert np.array_equal(read_result(pair, "dog_inpainted.png"), expected)


def test_one_bad_mask_does_not_stop_a_folder(
    run_dir: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = pair[0].parent / "both"
    folder.mkdir()
    for name in ("a", "b"):
        shutil.copy(pair[0], folder / f"{name}.png")
        shutil.copy(pair[1], folder / f"{name}_mask.png")
    Image.new("L", (94, 70)).save(folder / "a_mask.png")
    flags = ["--input_image", str(folder), "--input_mask", str(folder)]

    assert infer.main(command(run_dir, pair, *flags)) == 2
    error = capfd.readouterr().err
    assert "a_mask.png" in error
    assert "1 of 2 pairs failed" in error
    assert (pair[0].parent / "out" / "b_inpainted.png").is_file()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), FloatingPointError("NaN")])
def test_one_picture_that_the_networks_fail_on_does_not_stop_a_folder(
    error: Exception,
    run_dir: Path,
    pair: tuple[Path, Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, masks = pair[0].parent / "images", pair[0].parent / "masks"
    for folder, file in zip((images, masks), pair, strict=True):
        folder.mkdir()
        for name in ("a.png", "b.png"):
            shutil.copy(file, folder / name)
    fill, errors = infer.fill, [error]

    def fail_once(*args: Any, **kwargs: Any) -> list[np.ndarray]:
        if errors:
            raise errors.pop()
        return fill(*args, **kwargs)

    monkeypatch.setattr(infer, "fill", fail_once)
    flags = ["--input_image", str(images), "--input_mask", str(masks)]

    assert infer.main(command(run_dir, pair, *flags)) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("infer.py")]
    assert "a.png" in lines[0]
    assert lines[1:] == ["infer.py: 1 of 2 pairs failed, see above."]
    out = pair[0].parent / "out"
    assert sorted(path.name for path in out.iterdir()) == ["b_comparison.png", "b_inpainted.png"]


def test_a_full_disk_ends_a_folder_at_once(
    run_dir: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def write(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inpainting.pairs.write_results", write)
    assert infer.main(command(run_dir, pair)) == 1
    assert "No space left on device" in error_line(capfd)


def test_words_that_the_text_encoder_will_not_read_are_told(
    run_dir: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert infer.main(command(run_dir, pair, "--prompt", "a " * 76)) == 0
    line = error_line(capfd)
    assert "--prompt has 78 tokens: what comes after the first 77 is not read." in line


# Which base


def test_the_record_and_the_run_say_which_base(
    run_dir: Path, base_dir: Path, pair: tuple[Path, Path], tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lone = tmp_path / "elsewhere" / "controlnet.pth"
    lone.parent.mkdir()
    shutil.copy(run_dir / "final_model" / "controlnet.pth", lone)

    assert (
        infer.main(command(run_dir, pair, "--checkpoint_path", str(run_dir / "final_model"))) == 0
    )
    expected = read_result(pair)
    capfd.readouterr()
    flags = ["--checkpoint_path", str(lone), "--image_size", "64"]
    assert infer.main(command(run_dir, pair, *flags)) == 2
    assert "--pretrained_model_name_or_path" in error_line(capfd)
    flags += ["--pretrained_model_name_or_path", str(base_dir)]
    assert infer.main(command(run_dir, pair, *flags)) == 0
    assert np.array_equal(read_result(pair), expected)


def test_a_lone_file_of_the_default_bases_width_is_taken_for_its(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Older trainers recorded nothing, and knew no other base."""

    def find(width: int) -> tuple[str, str | None]:
        weights = {pipeline.TEXT_READER: torch.zeros(320, width)}
        return pipeline.find_base("old.pth", weights=weights, record=None, demo_base=BASE_DIR)

    assert find(768) == (DEFAULT_BASE, None)
    assert f"old.pth doesn't say which base it was trained with: taking {DEFAULT_BASE}" in (
        caplog.text
    )
    with pytest.raises(ValueError, match=r"old\.pth must come with a record of its base"):
        find(1024)


def test_a_base_known_by_name_alone_is_asked_for(
    run_dir: Path, pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(run_dir / "final_model", tmp_path / "moved")
    flags = ["--checkpoint_path", str(moved / "controlnet.pth")]

    assert infer.main(command(run_dir, pair, *flags)) == 2
    line = error_line(capfd)
    assert "'tiny'" in line
    assert "--pretrained_model_name_or_path" in line


def test_the_demos_base_needs_no_name(
    run_dir: Path, pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "moved", base_dir=BASE_DIR, base_name="demo")
    flags = ["--checkpoint_path", str(tmp_path / "moved" / "controlnet.pth")]

    assert infer.main(command(run_dir, pair, *flags)) == 0
    assert "infer.py:" not in capfd.readouterr().err


def test_what_the_trainer_leaves_is_used_without_naming_the_base(
    flags: list[str], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    trained = commands.run([*flags, "--max_steps", "1"], output_dir=tmp_path / "outputs")
    assert trained.code == 0, trained.output
    base_dir = flags[flags.index("--pretrained_model_name_or_path") + 1]
    results = []
    for name in ("final_model/controlnet.pth", "checkpoints/last.ckpt"):
        given = ["--checkpoint_path", str(trained.run_dir / name)]
        assert infer.main(command(trained.run_dir, pair, *given)) == 0, name
        results.append(read_result(pair))
    given = ["--pretrained_model_name_or_path", base_dir]
    infer.main(command(trained.run_dir, pair, *given))

    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], read_result(pair))


def test_another_base_is_warned_about_and_another_stride_refused(
    run_dir: Path, pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tuned = write_random_base(tmp_path / "tuned", seed=1)
    assert infer.main(command(run_dir, pair, "--pretrained_model_name_or_path", str(tuned))) == 0
    line = error_line(capfd)
    assert "tuned is not the base that" in line
    assert "was trained with" in line
    other = write_random_base(tmp_path / "other", stride=4)
    assert infer.main(command(run_dir, pair, "--pretrained_model_name_or_path", str(other))) == 2
    assert "stride 8" in error_line(capfd)


# What is refused or warned about


def test_a_hole_over_nearly_everything_is_warned_about_once(
    run_dir: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray((1 - hole(70, 94)) * np.uint8(255)).save(pair[1])
    flags = ["--mask_grow", "2"]
    assert infer.main(command(run_dir, pair, *flags)) == 0
    line = error_line(capfd)
    assert "mask.png: the hole covers 91 % of the picture" in line
    assert "add --invert_mask" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strength", "0.3"], "--num_inference_steps x --strength"),
        (["--strength", "0"], "--strength must be in (0, 1], got 0"),
        (["--num_images", "0"], "--num_images must be in [1, 10000], got 0"),
        (["--seed", "-1"], "--seed must be in"),
        (["--conditioning_scale", "inf"], "--conditioning_scale must be in [0, 100], got inf"),
        (["--guidance_scale", "nan"], "--guidance_scale must be in [0, 100], got nan"),
        (["--input_image", "nothing.png"], "--input_image must exist, got nothing.png"),
        (["--input_mask", "."], "two files or two folders"),
        (["--checkpoint_path", "nothing.pth"], "nothing.pth"),
        (["--device", "toaster"], "--device must be a device of this machine, got toaster"),
        (["--precision", "16-mixed"], "--precision 16-mixed must run on a GPU"),
        (["--pretrained_model_name_or_path", "./nothing"], "./nothing"),
    ],
)
def test_the_users_faults_are_told_in_one_line(
    run_dir: Path, pair: tuple[Path, Path], flags: list[str], message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert infer.main(command(run_dir, pair, *flags)) == 2
    assert message in error_line(capfd)


@pytest.mark.parametrize("which", ["picture", "mask"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"<!DOCTYPE html><html>404</html>", "got something else"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "got a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0u0\0\0u0\x08\x02\0\0\0", "must be a whole picture"),
        ("half", "must be a whole picture"),
    ],
    ids=["empty", "page", "pointer", "cut header", "half"],
)
def test_a_file_that_is_no_picture_is_refused_with_its_name(
    run_dir: Path, pair: tuple[Path, Path], which: str, content: bytes | str, message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = pair[which == "mask"]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    assert infer.main(command(run_dir, pair)) == 2
    line = error_line(capfd)
    assert f"{path} must be" in line
    assert message in line


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (10, 400)])
def test_a_picture_too_thin_to_work_on_is_refused(
    run_dir: Path, pair: tuple[Path, Path], shape: tuple[int, int],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    mask = np.zeros(shape, np.uint8)
    mask.ravel()[: mask.size // 4] = 255
    Image.fromarray(mask).convert("RGB").save(pair[0])
    Image.fromarray(mask).save(pair[1])
    assert infer.main(command(run_dir, pair)) == 2
    assert "at most 16 times as long" in error_line(capfd)


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch '{self.target}'",))


def test_weights_with_code_or_nan_are_refused_in_one_line(
    run_dir: Path, pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = torch.load(run_dir / "final_model" / "controlnet.pth", weights_only=True)
    path, target = tmp_path / "controlnet.pth", tmp_path / "owned"
    torch.save({**weights, "x": Exploit(target)}, path)
    assert infer.main(command(run_dir, pair, "--checkpoint_path", str(path))) == 2
    assert "must hold tensors only" in error_line(capfd)
    assert not target.exists()
    torch.save({**weights, "conv_in.bias": weights["conv_in.bias"] * torch.nan}, path)
    assert infer.main(command(run_dir, pair, "--checkpoint_path", str(path))) == 2
    assert "got NaN or infinite values in conv_in.bias" in error_line(capfd)


def test_a_mask_of_other_proportions_is_refused_with_its_name(
    run_dir: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(hole(94, 70) * np.uint8(255)).save(pair[1])
    assert infer.main(command(run_dir, pair)) == 2
    line = error_line(capfd)
    assert "mask.png" in line
    assert "a mask of 70x94 for a picture of 94x70" in line


def test_overflow_in_the_networks_is_a_failure_and_writes_nothing(
    run_dir: Path, pair: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = write_random_base(tmp_path / "broken")
    unet: Any = UNet2DConditionModel.from_pretrained(broken, subfolder="unet")
    unet.conv_out.bias.data.fill_(float("nan"))
    unet.save_pretrained(broken / "unet")

    assert infer.main(command(run_dir, pair, "--pretrained_model_name_or_path", str(broken))) == 1
    assert "overflowed" in capfd.readouterr().err
    assert not list((pair[0].parent / "out").iterdir())


# The process


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "infer.py"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_shortened_flags_are_refused(
    run_dir: Path, pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        infer.main(command(run_dir, pair, "--num_inference", "1"))
    line = (
        "infer.py: unrecognized arguments: --num_inference 1 (did you mean --num_inference_steps?)."
    )
    assert capfd.readouterr().err == f"{line} --help shows every flag.\n"


def test_a_stopped_command_says_so_by_its_code(run_dir: Path, pair: tuple[Path, Path]) -> None:
    """The folder of the results is made before the base is loaded: most imports come after."""
    processes = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        output_dir = pair[0].parent / number.name
        flags = ["--num_inference_steps", "1000", "--image_size", "256"]
        flags += ["--output_dir", str(output_dir)]
        processes[number] = start(*command(run_dir, pair, *flags)), output_dir
    deadline = time.monotonic() + 60
    for number, (process, output_dir) in processes.items():
        while not output_dir.is_dir() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
    for number, (process, output_dir) in processes.items():
        _, error = process.communicate(timeout=120)
        assert process.returncode == 128 + number, error
        assert "Traceback" not in error
        assert not list(output_dir.iterdir())


# Real pictures


@pytest.mark.skipif(not PAIRS.is_dir(), reason="the real picture pairs are not here")
def test_real_pairs_keep_their_known_pixels(run_dir: Path, tmp_path: Path) -> None:
    folder = PAIRS / "latent_diffusion"
    arguments = command(run_dir, (folder, folder), "--output_dir", str(tmp_path))
    assert infer.main([*arguments, "--crop_to_mask"]) == 0
    jobs = find_jobs(folder, folder)

    assert len(jobs) == 8
    for job in jobs:
        image, known = read_image(job.image_path), read_mask(job.mask_path) == 0
        result = np.asarray(Image.open(tmp_path / f"{job.prefix}inpainted.png"))
        assert np.array_equal(result[known], image[known]), job.image_path.name
        assert (result != image)[~known].mean() > 0.9, job.image_path.name
