"""A run leaves the same bits whatever is in its cache of latents, and whatever happens to it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests import tiny
from tests.commands import Death, Fault, run, run_typed
from tests.integration.test_resume import FORWARD, RESUME, assert_same_run

ENCODE = "model:Base.encode_image"
TWO_EPOCHS = [
    "--num_epochs", "2", "--ema_decay", "0.9", "--save_every_n_steps", "2",
    "--log_every_n_steps", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def straight(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that nothing disturbed, and the cache that it filled."""
    folder = tmp_path_factory.mktemp("straight")
    cache = folder / "latents"
    command = [*flags, *TWO_EPOCHS, "--cache_latents", cache]
    result = run(command, output_dir=folder / "outputs")
    assert result.code == 0, result.output
    assert "latents: 0.00 GB when all are kept" in result.output
    return result.run_dir, cache


def test_a_run_with_everything_cached_never_asks_the_encoder(
    straight: tuple[Path, Path], flags: list[str], output_dir: Path
) -> None:
    """One epoch sees one of a picture's two views: the same run again sees those that it filled."""
    run_dir, cache = straight
    command = [*flags, *TWO_EPOCHS, "--cache_latents", cache]
    again = run(command, output_dir=output_dir, deaths=[Death(ENCODE)])
    assert again.code == 0, "the encoder was called:\n" + again.output
    assert_same_run(run_dir, again.run_dir)


def test_a_killed_run_resumes_to_the_same_bits_with_its_cache_partly_filled(
    straight: tuple[Path, Path], flags: list[str], output_dir: Path, tmp_path: Path
) -> None:
    command = [*flags, *TWO_EPOCHS, "--cache_latents", tmp_path / "latents", "--num_workers", "2"]
    killed = run(command, output_dir=output_dir, deaths=[Death(FORWARD, 8)])
    assert killed.code == -signal.SIGKILL, killed.output
    resumed = run([*command, *RESUME], output_dir=output_dir)
    assert resumed.code == 0, resumed.output
    assert_same_run(straight[0], resumed.run_dir)


@pytest.mark.parametrize("fault", ["killed inside a write", "torn", "gone", "elsewhere"])
def test_whatever_happens_to_the_cache_the_resumed_run_is_the_same(
    straight: tuple[Path, Path], flags: list[str], output_dir: Path, tmp_path: Path, fault: str
) -> None:
    cache = tmp_path / "latents"
    command = [*flags, *TWO_EPOCHS, "--cache_latents", cache]
    death = Death("os:pwrite", 7, after=True) if "inside" in fault else Death(FORWARD, 8)
    killed = run(command, output_dir=output_dir, deaths=[death])
    assert killed.code == -signal.SIGKILL, killed.output
    if fault == "torn":
        for path in cache.rglob("*.moments"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 255
            path.write_bytes(content[:-1])
    elif fault == "gone":
        shutil.rmtree(cache)
    elif fault == "elsewhere":
        command[-1] = tmp_path / "other"
    resumed = run([*command, *RESUME], output_dir=output_dir)
    assert resumed.code == 0, resumed.output
    assert_same_run(straight[0], resumed.run_dir)


def test_a_full_disk_turns_the_cache_off_and_changes_nothing(
    straight: tuple[Path, Path], flags: list[str], output_dir: Path, tmp_path: Path
) -> None:
    command = [*flags, *TWO_EPOCHS, "--cache_latents", tmp_path / "latents"]
    disk_full = Fault("os:pwrite", 5, error=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    full = run(command, output_dir=output_dir, deaths=[disk_full])
    assert full.code == 0, full.output
    assert full.output.count("latents: no more are kept") == 1, full.output
    assert_same_run(straight[0], full.run_dir)


def test_without_the_cache_a_killed_run_resumes_to_the_same_bits(
    flags: list[str], tmp_path: Path
) -> None:
    command = [*flags, *TWO_EPOCHS, "--cache_latents", "off"]
    whole = run(command, output_dir=tmp_path / "whole")
    killed = run(command, output_dir=tmp_path / "killed", deaths=[Death(FORWARD, 8)])
    assert (whole.code, killed.code) == (0, -signal.SIGKILL), whole.output + killed.output
    assert "latents" not in whole.output
    resumed = run([*command, *RESUME], output_dir=tmp_path / "killed")
    assert resumed.code == 0, resumed.output
    assert_same_run(whole.run_dir, resumed.run_dir)


def test_two_ranks_share_a_cache(flags: list[str], tmp_path: Path) -> None:
    command = [
        *flags, "--batch_size", "1", "--devices", "2", "--strategy", "ddp", "--ema_decay", "0.9",
        "--cache_latents", tmp_path / "latents",
    ]  # fmt: skip
    filling = run(command, output_dir=tmp_path / "filling")
    assert filling.code == 0, filling.output
    again = run(command, output_dir=tmp_path / "again", deaths=[Death(ENCODE)])
    assert again.code == 0, again.output
    assert_same_run(filling.run_dir, again.run_dir)


def test_the_cache_filled_ahead_is_the_one_that_training_fills(
    straight: tuple[Path, Path], flags: list[str], output_dir: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "latents"
    command = ["-m", "tools.cache_latents", *flags, "--cache_latents", cache]
    code, stdout, stderr = run_typed(command)
    assert code == 0, stdout + stderr
    before = {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.moments")}
    assert len(before) == 3, "the centre, the crop, its mirror image"
    code, stdout, stderr = run_typed(command)
    assert code == 0, stdout + stderr
    after = {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.moments")}
    assert before == after, "nothing is encoded twice"

    command = [*flags, *TWO_EPOCHS, "--cache_latents", cache]
    trained = run(command, output_dir=output_dir, deaths=[Death(ENCODE)])
    assert trained.code == 0, "the encoder was called:\n" + trained.output
    assert_same_run(straight[0], trained.run_dir)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--cache_latents", "off"], "--cache_latents must be auto or a folder, got off"),
        (["--check"], "--check must be asked of train_lightning.py"),
        (["--dry_run"], "--dry_run must be asked of train_lightning.py"),
        (["--num_crops", "0"], "--num_crops must be at least 1, got 0"),
        (["--cache_latents", __file__], "--cache_latents must be a folder, got the file"),
    ],
)
def test_mistakes_are_answered_in_one_line(flags: list[str], extra, message: str) -> None:
    code, _, stderr = run_typed(["-m", "tools.cache_latents", *flags, *extra])
    assert code == 2, stderr
    assert stderr.startswith(f"error: {message}"), stderr
    assert len(stderr.splitlines()) == 1


@pytest.fixture
def spoilt(flags: list[str], tmp_path: Path) -> list[object]:
    """The command over a folder of which one picture is bad, and another one goes bad later."""
    folder = Path(shutil.copytree(tiny.coco_folder() / "images", tmp_path / "images"))
    for path in folder.iterdir():
        path.chmod(0o644)
    at_start, later = sorted(folder.iterdir())[3:5]
    at_start.write_bytes(b"")
    code = (
        "import pathlib, sys\n"
        "from inpainting import inspection\n"
        "from tools import cache_latents\n"
        "tried = inspection.try_pictures\n"
        "def spoil(index):\n"
        "    result = tried(index)\n"
        f"    pathlib.Path({str(later)!r}).write_bytes(b'')\n"
        "    return result\n"
        "inspection.try_pictures = spoil\n"
        "sys.exit(cache_latents.main(sys.argv[1:]))\n"
    )
    return ["-c", code, *flags, "--image_dir", folder, "--cache_latents", tmp_path / "latents"]


def test_an_unreadable_picture_is_left_out_and_named_once(spoilt: list[object]) -> None:
    code, stdout, stderr = run_typed([*spoilt, "--max_bad_fraction", "0.2", "--num_workers", "2"])
    assert code == 0, stdout + stderr
    assert (stdout + stderr).count("left out: ") == 2, stdout + stderr


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "at most 0.01 of the pictures may be bad, got 1 of 12"),
        (["--strict_data"], "--strict_data: every row must be sound, got 1 of 12"),
    ],
    ids=["too much", "strict"],
)
def test_bad_data_is_refused_as_training_does(spoilt: list[object], extra, message: str) -> None:
    code, _, stderr = run_typed([*spoilt, *extra])
    assert code == 2, stderr
    assert stderr.startswith(f"error: {message}"), stderr
    assert len(stderr.splitlines()) == 1
