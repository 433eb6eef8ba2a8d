"""DDP, several nodes and DeepSpeed train what one process trains, and stop and resume like it."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.same_bits import compare_runs, read_curves
from inpainting.runs import read_checkpoint

ROOT = Path(__file__).parents[2]
# The same samples in other groups: float32 sums of gradients in another order differ by about
# 1e-7 of the gradient. Adam divides by the gradient's own size, so where that is tiny (near its
# eps of 1e-8) the difference shows up in the parameter, as a share of what a step can move it:
# the learning rate, 1e-3. Measured: 2.5e-6 after 8 steps. Other samples would give 1e-3 and more.
TOLERANCE = 5e-5
# From the signal to the last process's end.
STOP_LIMIT_S = 60.0
TRAIN = [sys.executable, "train_lightning.py"]
TRAIN_DEEPSPEED = [sys.executable, "-m", "tests.cpu_deepspeed"]
# Two epochs of 5 steps, two pictures a step on all ranks together; saves after each step.
TWO_EPOCHS = ["--num_epochs", "2", "--save_every_n_steps", "1", "--log_every_n_steps", "1"]
ONE_PROCESS = [*TWO_EPOCHS, "--batch_size", "2"]
DDP = [*TWO_EPOCHS, "--batch_size", "1", "--devices", "2", "--strategy", "ddp"]
STEPS_PER_EPOCH = 5


class Command:
    """A command with a process group of its own, which never outlives the `with` block.

    Args:
        arguments: what is typed.
        output_dir: its --output_dir.
        limit_s: hard limit; past it the whole group is killed.
    """

    def __init__(
        self, arguments: Sequence[str], *, output_dir: Path, limit_s: float = 300.0
    ) -> None:
        self.output_dir = output_dir
        self.log_path = output_dir.parent / f"{output_dir.name}.{time.monotonic_ns()}.log"
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [*arguments, "--output_dir", str(output_dir)],
                cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.deadline = time.monotonic() + limit_s

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exception: object) -> None:
        self.signal_group(signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        return self.log_path.read_text(errors="replace").replace("\r", "\n")

    def signal_group(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def members(self) -> list[int]:
        """Return the process ids of the group, zombies left out."""
        lines = subprocess.run(
            ["ps", "-A", "-o", "pid=,pgid=,stat="], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        rows = [line.split() for line in lines]
        return [
            int(pid) for pid, group, stat in rows
            if int(group) == self.process.pid and not stat.startswith("Z")
        ]  # fmt: skip

    def wait_until(self, condition: Callable[[], object], *, limit_s: float | None = None) -> None:
        deadline = self.deadline if limit_s is None else time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"too slow, or it hangs:\n{self.output()}"
            time.sleep(0.01)

    def wait(self) -> Path:
        """Wait until all of it has ended well; returns the run folder."""
        self.wait_until(lambda: self.process.poll() is not None)
        assert self.process.returncode == 0, self.output()
        self.wait_until(lambda: not self.members())
        return only_run(self.output_dir)

    def wait_for_saves(self, num_saves: int) -> None:
        """Wait until last.ckpt has been written so many times; the first one is step 0."""
        seen: set[tuple[int, int]] = set()

        def has_saved() -> bool:
            assert self.process.poll() is None, f"ended too early:\n{self.output()}"
            for path in self.output_dir.glob("*/checkpoints/last.ckpt"):
                with suppress(FileNotFoundError):
                    seen.add((path.lstat().st_ino, path.lstat().st_mtime_ns))
            return len(seen) >= num_saves

        self.wait_until(has_saved)


def run(arguments: Sequence[str], *, output_dir: Path) -> Path:
    """Run a command to its end; returns the run folder."""
    with Command(arguments, output_dir=output_dir) as command:
        return command.wait()


def only_run(output_dir: Path) -> Path:
    folders = list(output_dir.iterdir())
    assert len(folders) == 1, f"one run folder was expected, got {folders}"
    return folders[0]


def read_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "final_model" / "controlnet.pth", weights_only=True)


def largest_difference(expected: Path, got: Path) -> tuple[float, str]:
    """Compare two runs' exports: the largest absolute difference, and where it is."""
    weights = [read_weights(run_dir) for run_dir in (expected, got)]
    assert weights[0].keys() == weights[1].keys()
    return max(
        ((tensor - weights[1][name]).abs().max().item(), name)
        for name, tensor in weights[0].items()
    )


def read_last_step(run_dir: Path) -> int:
    return read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["global_step"]


@pytest.fixture(scope="module")
def one_process(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process that takes two pictures a step."""
    folder = tmp_path_factory.mktemp("one_process")
    return run([*TRAIN, *flags, *ONE_PROCESS], output_dir=folder / "outputs")


@pytest.fixture(scope="module")
def ddp(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two processes that take one picture a step each."""
    folder = tmp_path_factory.mktemp("ddp")
    return run([*TRAIN, *flags, *DDP], output_dir=folder / "outputs")


def test_training_moves_the_weights_far_more_than_the_tolerance(one_process: Path) -> None:
    # A zero convolution starts at 0: its weights are what was learnt.
    weights = read_weights(one_process)["controlnet_mid_block.weight"]
    assert weights.abs().mean() > 10 * TOLERANCE


def test_ddp_ends_like_one_process_with_the_doubled_batch(one_process: Path, ddp: Path) -> None:
    difference, name = largest_difference(one_process, ddp)
    assert difference <= TOLERANCE, f"{name} differs by {difference}"


def test_ddp_validates_and_logs_like_one_process(one_process: Path, ddp: Path) -> None:
    curves = [read_curves(run_dir) for run_dir in (one_process, ddp)]
    assert curves[0].keys() == curves[1].keys() > {"val/loss_base", "val/control_gain"}
    for name in curves[0].keys() - {"train/samples_per_second", "val/psnr_hole"}:
        assert curves[1][name] == pytest.approx(curves[0][name], abs=TOLERANCE), name
    # In dB, of whole grey levels: the weights' last bits may turn one of them.
    psnr = [curve["val/psnr_hole"] for curve in curves]
    assert psnr[1] == pytest.approx(psnr[0], abs=0.05)


def test_two_nodes_by_torchrun_write_one_run_and_end_like_ddp(
    ddp: Path, flags: list[str], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def node(rank: int) -> Command:
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
            "--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", str(port),
        ]  # fmt: skip
        two_nodes = [*DDP, "--num_nodes", "2", "--devices", "1"]
        return Command(
            [*torchrun, "train_lightning.py", *flags, *two_nodes], output_dir=tmp_path / "outputs"
        )

    with node(0) as first, node(1) as second:
        run_dir = first.wait()
        second.wait()
    difference, name = largest_difference(ddp, run_dir)
    assert difference == 0, f"{name} differs by {difference}"


def test_ddp_killed_within_an_epoch_resumes_to_the_same_bits(
    ddp: Path, flags: list[str], tmp_path: Path
) -> None:
    output_dir = tmp_path / "outputs"
    with Command([*TRAIN, *flags, *DDP], output_dir=output_dir) as command:
        command.wait_for_saves(3)
    step = read_last_step(only_run(output_dir))
    assert 0 < step < STEPS_PER_EPOCH, f"it was to be killed within the first epoch, got {step}"
    resume = ["--resume_from_checkpoint", "last"]
    resumed = run([*TRAIN, *flags, *DDP, *resume], output_dir=output_dir)
    assert not compare_runs(ddp, resumed)


@pytest.mark.parametrize(
    ("signum", "goes_to", "exit_code"),
    [
        (signal.SIGTERM, "all ranks", 143),
        (signal.SIGINT, "all ranks", 130),
        (signal.SIGTERM, "the first rank", 143),
        (signal.SIGTERM, "another rank", 143),
    ],
    ids=["SIGTERM", "SIGINT", "SIGTERM to the first rank", "SIGTERM to another rank"],
)
def test_a_signal_stops_all_ranks_with_a_loadable_checkpoint(
    signum: int, goes_to: str, exit_code: int, flags: list[str], tmp_path: Path
) -> None:
    long = [*DDP, "--num_epochs", "1000", "--save_every_n_steps", "1000"]
    with Command([*TRAIN, *flags, *long], output_dir=tmp_path / "outputs") as command:
        command.wait_for_saves(2)
        ranks = command.members()
        assert len(ranks) == 2, f"two processes were expected, got {ranks}"
        first = command.process.pid
        if goes_to != "all ranks":
            ranks = [pid for pid in ranks if (pid == first) == (goes_to == "the first rank")]
        for pid in ranks:
            os.kill(pid, signum)
        command.wait_until(lambda: not command.members(), limit_s=STOP_LIMIT_S)
        assert command.process.wait() == exit_code, command.output()
        match = re.search(r"saved at step (\d+)", command.output())
        assert match, command.output()
    assert read_last_step(only_run(tmp_path / "outputs")) == int(match[1]) > 0


def test_a_signal_while_one_rank_waits_for_the_other_ends_both_at_once(
    flags: list[str], tmp_path: Path
) -> None:
    with Command([*TRAIN, *flags, *DDP], output_dir=tmp_path / "outputs") as command:
        command.wait_until(
            lambda: "run folder:" in command.output() and len(command.members()) == 2
        )
        for pid in command.members():
            os.kill(pid, signal.SIGTERM)
        command.wait_until(lambda: not command.members(), limit_s=STOP_LIMIT_S)
        assert command.process.wait() == 143, command.output()


@pytest.mark.parametrize(
    ("killed", "said"),
    [("the first", "the first process of this run is gone"),
     ("another", "of this run was killed by SIGKILL")],
)  # fmt: skip
def test_a_killed_rank_ends_the_other_one(
    killed: str, said: str, flags: list[str], tmp_path: Path
) -> None:
    long = [*DDP, "--num_epochs", "1000"]
    with Command([*TRAIN, *flags, *long], output_dir=tmp_path / "outputs") as command:
        command.wait_for_saves(2)
        first = command.process.pid
        [other] = [pid for pid in command.members() if pid != first]
        os.kill(first if killed == "the first" else other, signal.SIGKILL)
        command.wait_until(lambda: not command.members(), limit_s=STOP_LIMIT_S)
        assert command.process.wait() == (-signal.SIGKILL if killed == "the first" else 1)
        errors = [line for line in command.output().splitlines() if "error: " in line]
        assert len(errors) == 1, command.output()
        assert said in errors[0]
        assert errors[0].endswith("To go on: --resume_from_checkpoint last")
    assert read_last_step(only_run(tmp_path / "outputs")) > 0


def test_a_nan_on_one_rank_keeps_all_ranks_from_the_step(flags: list[str], tmp_path: Path) -> None:
    spoiled = [sys.executable, "-m", "tests.spoiled_training"]
    run_dir = run([*spoiled, *flags, *DDP, "--max_steps", "1"], output_dir=tmp_path / "outputs")
    assert "1 of the steps up to 1 had a NaN" in (run_dir / "run.log").read_text()
    # A zero convolution starts at 0, and any step moves it.
    assert not read_weights(run_dir)["controlnet_mid_block.weight"].any()


@pytest.mark.soak
@pytest.mark.parametrize("num_saves", [2, 4, 6, 8, 10])
def test_ddp_with_everything_resumes_to_the_same_bits(
    num_saves: int, flags: list[str], tmp_path: Path
) -> None:
    stateful = [
        *TRAIN, *flags, *DDP, "--accumulate_grad_batches", "2", "--ema_decay", "0.9",
        "--lr_scheduler", "cosine", "--num_workers", "2", "--num_epochs", "6",
    ]  # fmt: skip
    straight = run(stateful, output_dir=tmp_path / "straight")
    output_dir = tmp_path / "outputs"
    with Command(stateful, output_dir=output_dir) as command:
        command.wait_for_saves(num_saves)
    resumed = run([*stateful, "--resume_from_checkpoint", "last"], output_dir=output_dir)
    assert not compare_runs(straight, resumed)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
class TestDeepSpeed:
    """ZeRO over gloo, killed within an epoch and resumed: the whole path in one run per stage."""

    @pytest.fixture(scope="class", params=["deepspeed_stage_2", "deepspeed_stage_3"])
    def resumed(
        self,
        request: pytest.FixtureRequest,
        flags: list[str],
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Path:
        output_dir = tmp_path_factory.mktemp("deepspeed") / "outputs"
        deepspeed = [*TRAIN_DEEPSPEED, *flags, *DDP, "--strategy", request.param]
        with Command(deepspeed, output_dir=output_dir) as command:
            command.wait_for_saves(3)
        step = read_deepspeed_step(only_run(output_dir))
        assert 0 < step < STEPS_PER_EPOCH, f"it was to be killed within the epoch, got {step}"
        return run([*deepspeed, "--resume_from_checkpoint", "last"], output_dir=output_dir)

    def test_its_export_is_whole_and_ends_like_ddp(self, resumed: Path, ddp: Path) -> None:
        difference, name = largest_difference(ddp, resumed)
        assert difference <= TOLERANCE, f"{name} differs by {difference}"

    def test_its_curves_are_those_of_ddp(self, resumed: Path, ddp: Path) -> None:
        curves = [read_curves(run_dir) for run_dir in (ddp, resumed)]
        for name in ("train/loss", "train/grad_norm", "val/loss"):
            assert curves[1][name] == pytest.approx(curves[0][name], abs=TOLERANCE), name

    def test_its_inpaintings_are_those_of_ddp(self, resumed: Path, ddp: Path) -> None:
        """Within a grey level: weights that differ in their last bits may round to another one."""
        one, other = (np.stack(read_inpaintings(run_dir)) for run_dir in (resumed, ddp))
        assert np.abs(one - other).max() <= 1
        assert (one != other).mean() < 1e-3

    def test_last_ckpt_links_to_the_only_folder(self, resumed: Path) -> None:
        last = resumed / "checkpoints" / "last.ckpt"
        assert last.is_symlink()
        folders = [path for path in last.parent.glob("last.*") if not path.is_symlink()]
        assert folders == [last.resolve()]
        assert (last / "latest").read_text() == "checkpoint"
        assert read_deepspeed_step(resumed) == 2 * STEPS_PER_EPOCH


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed_mixes_precision_accumulates_and_averages_like_ddp(
    flags: list[str], tmp_path: Path
) -> None:
    mixed = [
        *flags, *DDP, "--num_epochs", "1", "--accumulate_grad_batches", "2",
        "--precision", "bf16-mixed", "--ema_decay", "0.9",
    ]  # fmt: skip
    expected = run([*TRAIN, *mixed], output_dir=tmp_path / "ddp")
    got = run(
        [*TRAIN_DEEPSPEED, *mixed, "--strategy", "deepspeed_stage_2"],
        output_dir=tmp_path / "deepspeed",
    )
    difference, name = largest_difference(expected, got)
    assert difference <= TOLERANCE, f"{name} differs by {difference}"
    curves = [read_curves(run_dir) for run_dir in (expected, got)]
    # The norm tells whether the gradients are averaged over the accumulated steps once.
    for curve in ("train/loss", "train/grad_norm", "val/loss"):
        assert curves[1][curve] == pytest.approx(curves[0][curve], abs=TOLERANCE), curve


def read_deepspeed_step(run_dir: Path) -> int:
    """Read the step of a DeepSpeed checkpoint of our own: it holds pickled objects."""
    folder = run_dir / "checkpoints" / "last.ckpt" / "checkpoint"
    state: dict[str, Any] = torch.load(
        next(folder.glob("*rank_00_model_states.pt")), weights_only=False
    )
    return state["global_step"]


def read_inpaintings(run_dir: Path) -> list[np.ndarray]:
    """Read the val/inpainted pictures, (H, W, 3) int64."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    files = [picture.encoded_image_string for picture in events.Images("val/inpainted")]
    assert files
    return [np.asarray(Image.open(io.BytesIO(file))).astype(np.int64) for file in files]
