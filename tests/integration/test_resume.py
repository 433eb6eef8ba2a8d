"""A run that was killed, stopped or changed goes on exactly where it was."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import tiny
from tests.commands import Death, Result, run, start

# Everything that has a state: accumulation, average, a schedule with warm-up, two epochs with
# validation and named checkpoints, saves inside an epoch.
STATEFUL = [
    "--num_epochs", "2", "--batch_size", "1", "--accumulate_grad_batches", "2",
    "--ema_decay", "0.9", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2",
    "--save_every_n_steps", "2", "--log_every_n_steps", "1",
]  # fmt: skip
RESUME = ["--resume_from_checkpoint", "last"]


@pytest.fixture(scope="module")
def straight(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    result = run([*flags, *STATEFUL], output_dir=tmp_path_factory.mktemp("straight") / "outputs")
    assert result.code == 0, result.output
    return result.run_dir


def assert_refused(result: Result, message: str) -> None:
    """One line, and exit code 2."""
    assert result.code == 2, result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.output
    assert message in errors[0]


def read_last(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def read_curves(run_dir: Path) -> dict[str, dict[int, float]]:
    """Return each step's value of everything but the speed."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"]) - {"train/samples_per_second"}
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


def list_differences(expected: Any, got: Any, *, at: str) -> list[str]:
    """Compare nested states bit by bit."""
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(expected, got) else [f"{at}: {(expected - got).abs().max()}"]
    if isinstance(expected, dict):
        if expected.keys() != got.keys():
            return [f"{at}: keys {expected.keys() ^ got.keys()}"]
        return [d for k in expected for d in list_differences(expected[k], got[k], at=f"{at}/{k}")]
    if isinstance(expected, list | tuple):
        if len(expected) != len(got):
            return [f"{at}: {len(expected)} entries, got {len(got)}"]
        pairs = enumerate(zip(expected, got, strict=True))
        return [d for i, pair in pairs for d in list_differences(*pair, at=f"{at}[{i}]")]
    return [] if expected == got else [f"{at}: {expected}, got {got}"]


def assert_same_run(expected: Path, got: Path) -> None:
    """Everything that a run leaves is the same, to the bit; how fast it was is another matter."""
    names = [sorted(p.name for p in (run / "checkpoints").iterdir()) for run in (expected, got)]
    assert names[0] == names[1]
    weights = [torch.load(run / "final_model" / "controlnet.pth") for run in (expected, got)]
    differences = list_differences(*weights, at="controlnet.pth")
    states = [read_last(run) for run in (expected, got)]
    for key in ("global_step", "epoch", "state_dict", "average", "optimizer_states",
                "lr_schedulers", "loss_sums", "loops"):  # fmt: skip
        differences += list_differences(*(state[key] for state in states), at=key)
    ranked = []
    for state in states:
        callback = next(v for k, v in state["callbacks"].items() if k.startswith("NamedCheckpoint"))
        scores = {Path(path).name: v for path, v in callback["best_k_models"].items()}
        ranked.append({**scores, "best": Path(callback["best_model_path"]).name})
    differences += list_differences(*ranked, at="ranking")
    differences += list_differences(*(read_curves(run) for run in (expected, got)), at="curves")
    assert not differences, "\n".join(differences)


SAVE = "lightning_checkpoints:LastCheckpoint._save"
EPOCH_END = "lightning_checkpoints:LastCheckpoint.on_train_epoch_end"
NAMED = "lightning_checkpoints:NamedCheckpoint.on_train_epoch_end"
FORWARD = "lightning_module:predict_noise"
VALIDATION = "lightning_callbacks:Curves.on_validation_start"
PICTURE = "lightning_callbacks:inpaint"
# FORWARD: 2 for the sanity check (the base alone, too), 10 to train, 3 to validate (of the base
# one picture is left), 10 to train, 2 to validate.
DEATHS = {
    "the first save, before the file has its name": [Death("torch:save", after=True)],
    "a later save, before the file has its name": [Death("torch:save", 2, after=True)],
    "between the micro-batches of a step": [Death(FORWARD, 8)],
    "right after a save inside an epoch": [Death(SAVE, 2, after=True)],
    "after a step, before its save": [Death(SAVE, 3)],
    "an epoch's last step, before validation": [Death(VALIDATION, 2)],
    "during validation": [Death(PICTURE)],
    "after validation, before the named checkpoint": [Death(NAMED)],
    "between the named checkpoint and last.ckpt": [Death(NAMED, after=True)],
    "an epoch's end": [Death(EPOCH_END, after=True)],
    "the second epoch": [Death(FORWARD, 23)],
    "before the export": [Death(EPOCH_END, 2, after=True)],
}


@pytest.mark.parametrize("deaths", DEATHS.values(), ids=DEATHS.keys())
def test_a_killed_run_resumes_to_the_same_bits(
    deaths: list[Death], straight: Path, flags: list[str], output_dir: Path
) -> None:
    killed = run([*flags, *STATEFUL], output_dir=output_dir, deaths=deaths)
    assert killed.code == -signal.SIGKILL, killed.output
    if not any(output_dir.glob("*/checkpoints/last.ckpt")):
        resumed = run([*flags, *STATEFUL, *RESUME], output_dir=output_dir)
        assert_refused(resumed, "needs a run with a loadable checkpoint")
        return
    resumed = run([*flags, *STATEFUL, *RESUME], output_dir=output_dir)
    assert resumed.code == 0, resumed.output
    assert "Training: " not in resumed.output, "a bar that doesn't know its epoch"
    assert_same_run(straight, resumed.run_dir)


def test_a_run_killed_twice_with_workers_resumes_to_the_same_bits(
    straight: Path, flags: list[str], output_dir: Path
) -> None:
    command = [*flags, *STATEFUL, "--num_workers", "2"]
    for deaths, resume in (
        ([Death(FORWARD, 7)], []), ([Death(FORWARD, 8)], RESUME), ([Death(NAMED)], RESUME)
    ):  # fmt: skip
        killed = run([*command, *resume], output_dir=output_dir, deaths=deaths)
        assert killed.code == -signal.SIGKILL, killed.output
    resumed = run([*command, *RESUME], output_dir=output_dir)
    assert resumed.code == 0, resumed.output
    assert_same_run(straight, resumed.run_dir)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_the_printed_flag_goes_on(
    signum: int, straight: Path, flags: list[str], output_dir: Path
) -> None:
    command = [*flags, *STATEFUL, "--num_workers", "2"]
    # It pauses at the 7th micro-batch: there the signal reaches the whole group, workers included.
    pause = Death(FORWARD, 9, signum=signal.SIGSTOP)
    running = start(command, output_dir=output_dir, deaths=[pause])
    stat = Path(f"/proc/{running.process.pid}/stat")
    running.wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "T")
    running.signal_group(signum)
    running.signal_group(signal.SIGCONT)
    stopped = running.wait()
    assert stopped.code == 128 + signum, stopped.output
    assert "Traceback" not in stopped.output
    name = signal.Signals(signum).name
    *_, said, hint = stopped.output.strip().splitlines()
    assert said == f"stopped by {name}, saved at step 4", stopped.output
    assert stopped.output.count("stopping after this step") == 1, stopped.output
    flag = shlex.split(hint.removeprefix("to go on: "))
    assert flag[0] == "--resume_from_checkpoint", hint
    resumed = run([*command, *flag], output_dir=output_dir)
    assert resumed.code == 0, resumed.output
    assert_same_run(straight, resumed.run_dir)


def test_ctrl_c_during_validation_stops_at_the_epochs_end(
    straight: Path, flags: list[str], output_dir: Path
) -> None:
    ctrl_c = Death(PICTURE, signum=signal.SIGINT)
    stopped = run([*flags, *STATEFUL], output_dir=output_dir, deaths=[ctrl_c])
    assert stopped.code == 130, stopped.output
    assert "saved at step 5" in stopped.output
    resumed = run([*flags, *STATEFUL, *RESUME], output_dir=output_dir)
    assert resumed.code == 0, resumed.output
    assert_same_run(straight, resumed.run_dir)


def test_a_ranking_by_the_fills_goes_on_as_if_nothing_had_happened(
    flags: list[str], tmp_path: Path
) -> None:
    ranked = [
        *flags, "--num_epochs", "3", "--ema_decay", "0.9", "--save_every_n_epochs", "1",
        "--save_top_k", "2", "--monitor", "val/psnr_hole",
    ]  # fmt: skip
    straight = run(ranked, output_dir=tmp_path / "straight")
    assert straight.code == 0, straight.output
    killed = run(ranked, output_dir=tmp_path / "killed", deaths=[Death(NAMED, 3)])
    assert killed.code == -signal.SIGKILL, killed.output
    resumed = run([*ranked, *RESUME], output_dir=tmp_path / "killed")
    assert resumed.code == 0, resumed.output
    assert_same_run(straight.run_dir, resumed.run_dir)

    before = set((resumed.run_dir / "checkpoints").glob("controlnet-*.ckpt"))
    assert len(before) == 2
    other = [*ranked, "--num_epochs", "4", "--monitor", "val/loss", *RESUME]
    again = run(other, output_dir=tmp_path / "killed")
    assert again.code == 0, again.output
    after = set((again.run_dir / "checkpoints").glob("controlnet-*.ckpt"))
    assert before < after, "another ranking must leave the old one's files"
    assert len(after) == 3


def test_a_second_ctrl_c_ends_at_once(flags: list[str], output_dir: Path) -> None:
    deaths = [Death(FORWARD, 4, signum=signal.SIGINT), Death(FORWARD, 5, signum=signal.SIGINT)]
    command = [*flags, "--accumulate_grad_batches", "5"]
    stopped = run(command, output_dir=output_dir, deaths=deaths)
    assert stopped.code == 130, stopped.output
    assert "saved at step" not in stopped.output
    assert "Traceback" not in stopped.output
    assert read_last(stopped.run_dir)["global_step"] == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("function", ["model:load_base", FORWARD])
def test_a_signal_before_the_first_step_ends_quietly(
    function: str, signum: int, flags: list[str], output_dir: Path
) -> None:
    stopped = run(flags, output_dir=output_dir, deaths=[Death(function, signum=signum)])
    assert stopped.code == 128 + signum, stopped.output
    assert "Traceback" not in stopped.output


def test_max_steps_within_an_epoch_resumes_to_the_same_bits_and_beyond(
    flags: list[str], tmp_path: Path
) -> None:
    command = [*flags, "--num_epochs", "2", "--ema_decay", "0.9", "--save_every_n_steps", "3"]
    whole = run(command, output_dir=tmp_path / "whole")
    short = [*command, "--max_steps", "7"]
    straight = run(short, output_dir=tmp_path / "straight")
    killed = run(short, output_dir=tmp_path / "killed", deaths=[Death(FORWARD, 10)])
    assert (whole.code, straight.code, killed.code) == (0, 0, -9), straight.output
    assert "done: 7 steps" in straight.output
    resumed = run([*short, *RESUME], output_dir=tmp_path / "killed")
    assert resumed.code == 0, resumed.output
    assert_same_run(straight.run_dir, resumed.run_dir)

    longer = run([*command, *RESUME], output_dir=tmp_path / "killed")
    assert "done: 10 steps" in longer.output
    states = [read_last(result.run_dir) for result in (whole, longer)]
    for key in ("state_dict", "average", "optimizer_states", "global_step", "epoch"):
        assert not list_differences(*(state[key] for state in states), at=key)


def test_a_named_checkpoint_of_a_cut_epoch_goes_on_inside_it(
    flags: list[str], tmp_path: Path
) -> None:
    command = [*flags, "--num_epochs", "2", "--save_every_n_steps", "3"]
    whole = run(command, output_dir=tmp_path / "whole")
    cut = run([*command, "--max_steps", "7"], output_dir=tmp_path / "cut")
    (named,) = (cut.run_dir / "checkpoints").glob("controlnet-epoch=01-*.ckpt")
    longer = run([*command, "--resume_from_checkpoint", str(named)], output_dir=tmp_path / "cut")
    assert "done: 10 steps" in longer.output, longer.output
    states = [read_last(result.run_dir) for result in (whole, longer)]
    for key in ("state_dict", "optimizer_states", "loops", "global_step", "epoch"):
        assert not list_differences(*(state[key] for state in states), at=key)


def test_more_epochs_go_on_as_if_they_had_been_asked_for_at_once(
    flags: list[str], tmp_path: Path
) -> None:
    straight = run([*flags, "--num_epochs", "3"], output_dir=tmp_path / "straight")
    run(flags, output_dir=tmp_path / "outputs")
    again = run([*flags, *RESUME], output_dir=tmp_path / "outputs")
    assert again.code == 0, again.output
    assert "done: 5 steps" in again.output, "a finished run is exported again"
    resumed = run([*flags, *RESUME, "--num_epochs", "3"], output_dir=tmp_path / "outputs")
    assert "done: 15 steps" in resumed.output
    states = [read_last(result.run_dir) for result in (straight, resumed)]
    for key in ("state_dict", "optimizer_states", "global_step", "epoch"):
        assert not list_differences(*(state[key] for state in states), at=key)


def read_originals(run_dir: Path) -> dict[int, list[bytes]]:
    """Return the pictures of train/original at each step."""
    events = EventAccumulator(str(run_dir), size_guidance={"images": 0}).Reload()
    pictures = {}
    for event in events.Images("train/original"):
        row = Image.open(io.BytesIO(event.encoded_image_string))
        lefts = range(0, row.width, tiny.SIZE)
        pictures[event.step] = [
            row.crop((left, 0, left + tiny.SIZE, tiny.SIZE)).tobytes() for left in lefts
        ]
    return pictures


def test_another_batch_size_goes_on_with_the_next_sample(flags: list[str], tmp_path: Path) -> None:
    command = [*flags, "--log_images_every_n_steps", "1", "--save_every_n_steps", "2"]
    straight = run(command, output_dir=tmp_path / "straight")
    order = [picture for step in read_originals(straight.run_dir).values() for picture in step]
    assert len(order) == len(set(order)) == 10

    killed = run(command, output_dir=tmp_path / "outputs", deaths=[Death(SAVE, 2, after=True)])
    assert killed.code == -signal.SIGKILL
    resumed = run([*command, *RESUME, "--batch_size", "3"], output_dir=tmp_path / "outputs")
    assert resumed.code == 0, resumed.output
    seen = read_originals(resumed.run_dir)
    # Two steps of 2 are done; what is left of an epoch of three whole batches of 3 is one batch.
    assert [len(seen[step]) for step in sorted(seen)] == [2, 2, 3]
    assert [order.index(picture) for step in sorted(seen) for picture in seen[step]] == [*range(7)]


def test_a_moved_checkpoint_goes_on_in_a_new_folder(
    straight: Path, flags: list[str], tmp_path: Path
) -> None:
    moved = shutil.copy(straight / "checkpoints" / "last.ckpt", tmp_path / "my run.ckpt")
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    command = [*flags, *STATEFUL, "--num_epochs", "3", "--resume_from_checkpoint", str(moved)]
    killed = run(command, output_dir=tmp_path / "outputs", deaths=[Death(FORWARD)])
    assert read_last(killed.run_dir)["global_step"] == 10, "something to resume from at once"
    assert "resuming from" in (killed.run_dir / "run.log").read_text()
    shutil.rmtree(tmp_path / "outputs")
    resumed = run(command, output_dir=tmp_path / "outputs")
    assert resumed.code == 0, resumed.output
    assert "isn't in a run folder" in resumed.output
    assert read_last(resumed.run_dir)["global_step"] == 15
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_last_passes_over_a_torn_checkpoint(
    straight: Path, flags: list[str], output_dir: Path
) -> None:
    killed = run([*flags, *STATEFUL], output_dir=output_dir, deaths=[Death(FORWARD, 22)])
    last = killed.run_dir / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:100_000])
    resumed = run([*flags, *STATEFUL, *RESUME], output_dir=output_dir)
    assert resumed.code == 0, resumed.output
    assert re.search(r"resuming from .*epoch=00.*\.ckpt at step 5", resumed.output)
    assert_same_run(straight, resumed.run_dir)


def test_what_cannot_be_resumed_is_refused_in_one_line(
    straight: Path, flags: list[str], tmp_path: Path
) -> None:
    checkpoints = straight / "checkpoints"
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes((checkpoints / "last.ckpt").read_bytes()[:100_000])
    no_average = torch.load(checkpoints / "last.ckpt", weights_only=True)
    del no_average["average"]
    torch.save(no_average, tmp_path / "no_average.ckpt")
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "latest").write_text("checkpoint")
    other_base = ["--pretrained_model_name_or_path", str(tiny.base_folder(stride=4))]
    for value, extra, message in (
        (torn, [], "can't be read"),
        (straight / "final_model" / "controlnet.pth", [], "--controlnet_weights"),
        (tmp_path / "missing.ckpt", [], "must be a checkpoint that exists"),
        (tmp_path, [], "must be a checkpoint that exists"),
        (tmp_path / "deepspeed", ["--strategy", "ddp"], "got the DeepSpeed folder"),
        ("last", [], "loadable checkpoint"),
        (tmp_path / "no_average.ckpt", ["--ema_decay", "0.9"], "--ema_decay"),
        (checkpoints / "last.ckpt", other_base, "a run with this base"),
    ):
        command = [*flags, *extra, "--resume_from_checkpoint", str(value)]
        assert_refused(run(command, output_dir=tmp_path / "outputs"), message)
    assert not (tmp_path / "outputs").exists()
