"""Whatever goes wrong, the last checkpoint loads, one line says what to type, and nobody hangs."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.same_bits import compare_runs, read_last
from tests.commands import Death, Fault, Result, run, start

FORWARD = "lightning_module:InpaintingControlNet.loss"
SAVED_OFTEN = ["--save_every_n_steps", "1", "--log_every_n_steps", "1"]
DISK_MB = 10  # the tiny base's checkpoint has 6 MB, without Adam's state 2


def assert_failed(result: Result, message: str) -> list[str]:
    """One line that says what happened, exit code 1; returns the flags that it says to type."""
    assert result.code == 1, result.output
    lines = [line for line in result.output.splitlines() if "error: " in line]
    assert len(lines) == 1, result.output
    assert message in lines[0]
    assert "Traceback" not in result.output
    return shlex.split(lines[0].split("To go on: ")[1])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An --output_dir on a file system with room for one checkpoint and a half."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(
    flags: list[str], small_disk: Path
) -> None:
    command = [*flags, *SAVED_OFTEN]
    result = run(command, output_dir=small_disk)
    hint = assert_failed(result, "No space left on device")
    names = [path.name for path in (result.run_dir / "checkpoints").iterdir()]
    assert names == ["last.ckpt"]
    assert read_last(result.run_dir)["global_step"] == 1
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    resumed = run([*command, *hint], output_dir=small_disk)
    assert resumed.code == 0, resumed.output
    assert "done: 5 steps" in resumed.output


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_folder_that_may_not_be_written_to_any_more_is_said(
    number: int, flags: list[str], output_dir: Path
) -> None:
    refused = Fault("torch:save", 2, error=OSError(number, os.strerror(number)))
    result = run([*flags, *SAVED_OFTEN], output_dir=output_dir, deaths=[refused])
    hint = assert_failed(result, os.strerror(number))
    assert hint == ["--resume_from_checkpoint", str(result.run_dir / "checkpoints" / "last.ckpt")]
    assert read_last(result.run_dir)["global_step"] == 0


def test_a_deleted_folder_is_made_again_and_saved_into(flags: list[str], output_dir: Path) -> None:
    pause = Death(FORWARD, 5, signum=signal.SIGSTOP)  # the third step
    running = start([*flags, *SAVED_OFTEN], output_dir=output_dir, deaths=[pause])
    running.wait_until_paused()
    shutil.rmtree(output_dir)
    running.signal_group(signal.SIGCONT)
    result = running.wait()
    assert result.code == 0, result.output
    assert "Traceback" not in result.output
    assert result.output.count("was deleted: made again") == 1
    names = {path.name for path in result.run_dir.iterdir() if "tfevents" not in path.name}
    assert names == {"run.json", "run.log", "checkpoints", "final_model"}
    assert "done: 5 steps" in (result.run_dir / "run.log").read_text()
    longer = [*flags, "--num_epochs", "2", "--resume_from_checkpoint", "last"]
    resumed = run(longer, output_dir=output_dir)
    assert "done: 10 steps" in resumed.output, resumed.output


def test_a_killed_loader_process_ends_the_run(flags: list[str], output_dir: Path) -> None:
    pause = Death(FORWARD, 5, signum=signal.SIGSTOP)
    command = [*flags, *SAVED_OFTEN, "--num_workers", "1", "--val_split", "0.2"]
    running = start(command, output_dir=output_dir, deaths=[pause])
    running.wait_until_paused()
    for worker in running.children():
        os.kill(worker, signal.SIGKILL)
    running.signal_group(signal.SIGCONT)
    result = running.wait()
    hint = assert_failed(result, "a loader process died")
    assert read_last(result.run_dir)["global_step"] >= 2
    resumed = run([*command, *hint], output_dir=output_dir)
    assert "done: 5 steps" in resumed.output, resumed.output


def test_a_validation_that_fails_keeps_its_traceback_and_the_run(
    flags: list[str], output_dir: Path
) -> None:
    fault = Fault("lightning_callbacks:inpaint")
    result = run([*flags, *SAVED_OFTEN], output_dir=output_dir, deaths=[fault])
    assert result.code == 1, result.output
    assert "KeyError: 'a fault of ours'" in result.output
    assert "Traceback" in (result.run_dir / "run.log").read_text()
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("error: the run failed, by a fault of the trainer")
    resumed = run([*flags, *shlex.split(last.split("To go on: ")[1])], output_dir=output_dir)
    assert "done: 5 steps" in resumed.output, resumed.output


def test_what_fails_before_the_first_save_is_to_be_started_again(
    flags: list[str], output_dir: Path
) -> None:
    result = run(flags, output_dir=output_dir, deaths=[Fault("torch:save")])
    assert result.code == 1, result.output
    assert "To go on: the same command again: nothing was saved yet" in result.output


def test_odd_paths_and_a_temporary_folder_elsewhere_change_nothing(
    flags: list[str], tmp_path: Path
) -> None:
    command = [*flags, *SAVED_OFTEN]
    straight = run(command, output_dir=tmp_path / "straight")
    odd = tmp_path / 'it\'s a "run", 100% {of} [it] $HOME\n图像修补'
    odd.mkdir()
    elsewhere = Path("/dev/shm") / f"tests-{os.getpid()}"
    elsewhere.mkdir()
    environment = {"TMPDIR": str(elsewhere)}
    assert elsewhere.stat().st_dev != tmp_path.stat().st_dev
    try:
        ctrl_c = Death(FORWARD, 5, signum=signal.SIGINT)
        stopped = run(command, output_dir=odd / "outputs", deaths=[ctrl_c], environment=environment)
        assert stopped.code == 130, stopped.output
        hint = shlex.split(stopped.output.split("to go on: ")[1])
        assert hint[1] == str(stopped.run_dir / "checkpoints" / "last.ckpt")
        resumed = run([*command, *hint], output_dir=odd / "outputs", environment=environment)
        assert resumed.code == 0, resumed.output
        assert list(elsewhere.iterdir()) == []
    finally:
        shutil.rmtree(elsewhere)
    assert not compare_runs(straight.run_dir, resumed.run_dir)
    typed = re.search(r"--checkpoint_path (.*?) --input_image", resumed.output, re.DOTALL)
    assert typed
    assert Path(*shlex.split(typed[1])).is_file()


def test_not_finite_for_a_few_steps_ends_the_run_and_names_pictures(
    flags: list[str], output_dir: Path
) -> None:
    # A rate that throws the weights to where nothing is finite any more.
    command = [*flags, *SAVED_OFTEN, "--learning_rate", "1e30", "--num_epochs", "4"]
    result = run(command, output_dir=output_dir)
    assert_failed(result, "was NaN or infinite in the last 5 steps, which were left out; pictures")
    parameters = read_last(result.run_dir)["state_dict"].values()
    assert all(tensor.isfinite().all() for tensor in parameters)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_memory_and_open_files_stay_flat(flags: list[str], output_dir: Path) -> None:
    command = [
        *flags, "--num_epochs", "1000", "--num_workers", "2", "--ema_decay", "0.9",
        "--log_every_n_steps", "5", "--log_images_every_n_steps", "50",
        "--save_every_n_steps", "20", "--save_every_n_epochs", "10",
    ]  # fmt: skip
    running = start(command, output_dir=output_dir, limit_s=3000.0)
    process = Path(f"/proc/{running.process.pid}")
    held: list[tuple[float, int]] = []
    while running.process.is_alive():
        with suppress(FileNotFoundError, ProcessLookupError):
            rss_kb = int(re.findall(r"VmRSS:\s+(\d+)", (process / "status").read_text())[0])
            held.append((rss_kb / 1024, len([*(process / "fd").iterdir()])))
        time.sleep(1)
    result = running.wait()
    assert "done: 5000 steps" in result.output
    # What is loaded late is loaded in the first fifth.
    settled = held[len(held) // 5 :]
    halves = settled[: len(settled) // 2], settled[len(settled) // 2 :]
    megabytes, descriptors = (
        [max(sample[i] for sample in half) for half in halves] for i in (0, 1)
    )
    assert megabytes[1] < megabytes[0] + 20, megabytes
    assert descriptors[1] <= descriptors[0] + 2, descriptors
