"""A run that was killed, stopped or changed goes on exactly where it was."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from functools import cache, partial
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.same_bits import compare_runs, list_differences, read_curves, read_last
from demo.random_base import write_random_base
from tests import tiny
from tests.commands import Death, Result, run, start

# What has a state in every run: a schedule with warm-up, two epochs with named checkpoints, saves
# inside an epoch. And what may have one; any two of the three, with and without, meet in VARIANTS.
TWO_EPOCHS = [
    "--num_epochs", "2", "--batch_size", "1", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2",
    "--save_every_n_steps", "2", "--log_every_n_steps", "1",
]  # fmt: skip
ACCUMULATED, AVERAGED = ["--accumulate_grad_batches", "2"], ["--ema_decay", "0.9"]
NOT_VALIDATED = ["--val_split", "0"]
STATEFUL = [*TWO_EPOCHS, *ACCUMULATED, *AVERAGED]
VARIANTS = {
    "accumulated, validated, averaged": STATEFUL,
    "accumulated": [*TWO_EPOCHS, *ACCUMULATED, *NOT_VALIDATED],
    "validated": TWO_EPOCHS,
    "averaged": [*TWO_EPOCHS, *AVERAGED, *NOT_VALIDATED],
}
OTHER_VARIANTS = {
    "plain": [*TWO_EPOCHS, *NOT_VALIDATED],
    "accumulated, validated": [*TWO_EPOCHS, *ACCUMULATED],
    "accumulated, averaged": [*STATEFUL, *NOT_VALIDATED],
    "validated, averaged": [*TWO_EPOCHS, *AVERAGED],
}
RESUME = ["--resume_from_checkpoint", "last"]


@pytest.fixture(scope="module")
def straight_of(
    flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return the folder of a variant's run that nothing disturbed, without loader processes."""

    @cache
    def straight_of(variant: str) -> Path:
        command = [*flags, *(VARIANTS | OTHER_VARIANTS)[variant]]
        result = run(command, output_dir=tmp_path_factory.mktemp("straight") / "outputs")
        assert result.code == 0, result.output
        return result.run_dir

    return straight_of


@pytest.fixture(scope="module")
def straight(straight_of: Callable[[str], Path]) -> Path:
    """The folder of a run with everything that has a state."""
    return straight_of("accumulated, validated, averaged")


def assert_refused(result: Result, message: str) -> None:
    """One line, and exit code 2."""
    assert result.code == 2, result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.output
    assert message in errors[0]


def assert_same_run(expected: Path, got: Path) -> None:
    """Everything that a run leaves is the same, to the bit."""
    differences = compare_runs(expected, got)
    assert not differences, "\n".join(differences)


SAVE = "lightning_checkpoints:LastCheckpoint._save"
EPOCH_END = "lightning_checkpoints:LastCheckpoint.on_train_epoch_end"
NAMED = "lightning_checkpoints:NamedCheckpoint.on_train_epoch_end"
FORWARD = "lightning_module:InpaintingControlNet.loss"
VALIDATION = "lightning_callbacks:Curves.on_validation_start"
PICTURE = "lightning_callbacks:inpaint"


def forward(variant: str, *, epoch: int, batch: int) -> Death:
    """Kill before the forward pass of a micro-batch, counted from 1.

    A validation adds 2 for the sanity check (the base alone, too) and 3 for an epoch's (of the base
    one picture is left).
    """
    validates = "validated" in variant
    epoch_size = 10 if validates else 12
    return Death(FORWARD, 2 * validates + epoch * (epoch_size + 3 * validates) + batch)


MOMENTS: dict[str, Callable[[str], Death]] = {
    "the first save, before the file has its name": lambda _: Death("torch:save", after=True),
    "a later save, before the file has its name": lambda _: Death("torch:save", 2, after=True),
    "within an epoch": lambda variant: forward(variant, epoch=0, batch=6),
    "right after a save inside an epoch": lambda _: Death(SAVE, 2, after=True),
    "after a step, before its save": lambda _: Death(SAVE, 3),
    "an epoch's last step, before validation": lambda _: Death(VALIDATION, 2),
    "during validation": lambda _: Death(PICTURE),
    "before the named checkpoint": lambda _: Death(NAMED),
    "between the named checkpoint and last.ckpt": lambda _: Death(NAMED, after=True),
    "an epoch's end": lambda _: Death(EPOCH_END, after=True),
    "the second epoch": lambda variant: forward(variant, epoch=1, batch=8),
    "before the export": lambda _: Death(EPOCH_END, 2, after=True),
}
# Each moment once; each pair of (number of loader processes, accumulated, validated, averaged).
ROWS = [
    ("the first save, before the file has its name", "accumulated", 0),
    ("a later save, before the file has its name", "averaged", 4),
    ("within an epoch", "accumulated", 4),
    ("right after a save inside an epoch", "averaged", 0),
    ("after a step, before its save", "validated", 4),
    ("an epoch's last step, before validation", "accumulated, validated, averaged", 4),
    ("during validation", "validated", 0),
    ("before the named checkpoint", "accumulated, validated, averaged", 0),
    ("between the named checkpoint and last.ckpt", "accumulated", 4),
    ("an epoch's end", "averaged", 4),
    ("the second epoch", "accumulated, validated, averaged", 0),
    ("before the export", "accumulated", 0),
]
ALL_ROWS = [
    (moment, variant, num_workers)
    for moment in MOMENTS
    for variant in VARIANTS | OTHER_VARIANTS
    for num_workers in (0, 4)
    if "validated" in variant or "validation" not in moment
]


def test_the_rows_hold_each_moment_and_each_pair_of_settings() -> None:
    assert {moment for moment, _, _ in ROWS} == MOMENTS.keys()

    def settings(variant: str, num_workers: int) -> list[tuple[str, object]]:
        parts = ("accumulated", "validated", "averaged")
        return [("workers", num_workers), *((part, part in variant) for part in parts)]

    pairs = [
        {
            pair
            for _, variant, workers in rows
            for pair in combinations(settings(variant, workers), 2)
        }
        for rows in (ROWS, ALL_ROWS)
    ]
    assert pairs[0] == pairs[1], pairs[1] - pairs[0]


@pytest.mark.parametrize(("moment", "variant", "num_workers"), ROWS)
def test_a_killed_run_resumes_to_the_same_bits(
    moment: str, variant: str, num_workers: int, straight_of: Callable[[str], Path],
    flags: list[str], output_dir: Path,
) -> None:  # fmt: skip
    command = [*flags, *(VARIANTS | OTHER_VARIANTS)[variant], "--num_workers", str(num_workers)]
    killed = run(command, output_dir=output_dir, deaths=[MOMENTS[moment](variant)])
    assert killed.code == -signal.SIGKILL, killed.output
    if not any(output_dir.glob("*/checkpoints/last.ckpt")):
        resumed = run([*command, *RESUME], output_dir=output_dir)
        assert_refused(resumed, "needs a run with a loadable checkpoint")
        return
    resumed = run([*command, *RESUME], output_dir=output_dir)
    assert resumed.code == 0, resumed.output
    assert "Training: " not in resumed.output, "a bar that doesn't know its epoch"
    assert "changed: " not in resumed.output
    assert_same_run(straight_of(variant), resumed.run_dir)


@pytest.mark.soak
@pytest.mark.parametrize(("moment", "variant", "num_workers"), sorted({*ALL_ROWS} - {*ROWS}))
def test_every_killed_run_resumes_to_the_same_bits(
    moment: str, variant: str, num_workers: int, straight_of: Callable[[str], Path],
    flags: list[str], output_dir: Path,
) -> None:  # fmt: skip
    test_a_killed_run_resumes_to_the_same_bits(
        moment, variant, num_workers, straight_of, flags, output_dir
    )


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", ["regional", "full"])
def test_a_compiled_run_resumes_to_the_same_bits(
    mode: str, flags: list[str], output_dir: Path
) -> None:
    command = [*flags, *TWO_EPOCHS, *NOT_VALIDATED, "--compile", mode, "--gradient_checkpointing"]
    run_patiently = partial(run, limit_s=2000.0)
    straight = run_patiently(command, output_dir=output_dir.with_name("straight"))
    assert straight.code == 0, straight.output
    killed = run_patiently(command, output_dir=output_dir, deaths=[Death(FORWARD, 4)])
    assert killed.code == -signal.SIGKILL, killed.output
    resumed = run_patiently([*command, *RESUME], output_dir=output_dir)
    assert resumed.code == 0, resumed.output
    assert_same_run(straight.run_dir, resumed.run_dir)


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
    running.wait_until_paused()
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


@pytest.mark.parametrize(("step", "num_workers"), [(1, 2), (2, 0)])
def test_a_signal_within_a_validation_stops_it_and_nothing_is_lost(
    step: int, num_workers: int, straight: Path, flags: list[str], output_dir: Path
) -> None:
    """The sanity check is one step of validation."""
    validates = "lightning_module:InpaintingControlNet.validation_step"
    deaths = [Death(validates, 1 + step, signum=signal.SIGTERM)]
    command = [*flags, *STATEFUL, "--num_workers", str(num_workers)]
    stopped = run(command, output_dir=output_dir, deaths=deaths)
    assert stopped.code == 143, stopped.output
    assert "saved at step 4" in stopped.output
    resumed = run([*command, *RESUME], output_dir=output_dir)
    assert resumed.code == 0, resumed.output
    assert_same_run(straight, resumed.run_dir)


def test_ctrl_c_after_the_validations_pictures_stops_at_the_epochs_end(
    straight: Path, flags: list[str], output_dir: Path
) -> None:
    ctrl_c = Death(PICTURE, signum=signal.SIGINT)
    stopped = run([*flags, *STATEFUL], output_dir=output_dir, deaths=[ctrl_c])
    assert stopped.code == 130, stopped.output
    assert "saved at step 5" in stopped.output
    resumed = run([*flags, *STATEFUL, *RESUME], output_dir=output_dir)
    assert resumed.code == 0, resumed.output
    assert_same_run(straight, resumed.run_dir)


@pytest.mark.parametrize(("earlier", "now"), [("1", "2"), ("2", "1")])
def test_the_schedule_keeps_its_place_in_the_epochs_with_another_batch_size(
    earlier: str, now: str, flags: list[str], tmp_path: Path
) -> None:
    """Counted in steps, it would be over already, or far from its end."""
    command = [*flags, "--num_epochs", "4", "--lr_scheduler", "cosine", "--log_every_n_steps", "1"]
    steps = 10 // int(earlier)  # of an epoch; the third one has begun
    death = Death("lightning_module:InpaintingControlNet.training_step", 2 * steps + 2)
    killed = run([*command, "--batch_size", earlier], output_dir=tmp_path / "o", deaths=[death])
    assert killed.code == -signal.SIGKILL, killed.output
    resumed = run([*command, "--batch_size", now, *RESUME], output_dir=tmp_path / "o")
    assert resumed.code == 0, resumed.output
    rates = list(read_curves(resumed.run_dir)["train/lr"].values())
    before, after = rates[: 2 * steps], rates[2 * steps :]
    assert len(after) == 2 * 10 // int(now)
    assert all(a > b for a, b in pairwise(rates)), rates
    assert after[0] == pytest.approx(before[-1], rel=0.6), "half of the way is left"
    assert after[-1] < 0.05 * rates[0], "it ends at its end"


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


def test_every_changed_flag_is_said_and_has_its_effect(flags: list[str], output_dir: Path) -> None:
    command = [*flags, "--log_every_n_steps", "1", "--lr_scheduler", "linear"]
    first = run(command, output_dir=output_dir)
    changed = {
        "--num_epochs": "1 -> 2: takes effect",
        "--learning_rate": "0.001 -> 0.002: takes effect",
        "--adam_weight_decay": "0.01 -> 0.1: takes effect",
        "--lr_scheduler": "linear -> constant: takes effect",
        "--num_workers": "0 -> 1: takes effect",
        "--cache_latents": "auto -> off: takes effect",
        "--gradient_clip_val": "1.0 -> 0.5: changes the bits",
    }
    values = [
        word
        for flag, line in changed.items()
        for word in (flag, line.split(" -> ")[1].split(":")[0])
    ]
    resumed = run([*command, *values, *RESUME], output_dir=output_dir)
    assert resumed.code == 0, resumed.output
    said = re.findall(r"^changed: (--\w+) (.*)$", resumed.output, re.MULTILINE)
    assert dict(said) == changed, resumed.output
    latents = "changed: the latents (--cache_latents) rounded -> unrounded: changes the bits"
    assert latents in resumed.output
    assert "but not to the same bits" in resumed.output
    log = (resumed.run_dir / "run.log").read_text()
    assert "changed: --num_epochs 1 -> 2: takes effect" in log
    rates = read_curves(resumed.run_dir)["train/lr"]
    assert rates[5] == pytest.approx(1e-3 * (1 - 4 / 5))
    assert [rates[step] for step in range(6, 11)] == pytest.approx([2e-3] * 5)
    assert first.run_dir == resumed.run_dir
    [group] = read_last(resumed.run_dir)["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == 0.1


def test_a_run_that_goes_on_cannot_be_resumed_beside_it_and_can_be_when_killed(
    straight: Path, flags: list[str], output_dir: Path
) -> None:
    pause = Death(FORWARD, 9, signum=signal.SIGSTOP)
    command = [*flags, *STATEFUL, "--num_workers", "1"]
    running = start(command, output_dir=output_dir, deaths=[pause])
    running.wait_until_paused()
    beside = run([*command, *RESUME], output_dir=output_dir)
    assert_refused(beside, "must have no other run going on in it")
    for worker in running.children():  # they would notice within seconds that the run is gone
        os.kill(worker, signal.SIGSTOP)
    os.kill(running.process.pid or 0, signal.SIGKILL)
    running.process.join()
    resumed = run([*command, *RESUME], output_dir=output_dir)
    running.wait()
    assert resumed.code == 0, resumed.output
    assert_same_run(straight, resumed.run_dir)


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
    assert json.loads((resumed.run_dir / "run.json").read_text())["origin"] == str(moved)
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


def test_a_checkpoint_is_looked_for_before_the_demos_scenes_are_drawn(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    result = run(RESUME, output_dir=tmp_path, environment={"XDG_CACHE_HOME": str(cache)})
    assert_refused(result, "loadable checkpoint")
    assert not cache.exists()


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
    other_base, same_shape = (
        ["--pretrained_model_name_or_path", str(folder)]
        for folder in (tiny.base_folder(stride=4), write_random_base(tmp_path / "base", seed=1))
    )
    velocity = ["--prediction_type", "v_prediction"]
    for value, extra, message in (
        (torn, [], "can't be read"),
        (straight / "final_model" / "controlnet.pth", [], "--controlnet_weights"),
        (tmp_path / "missing.ckpt", [], "must be a checkpoint that exists"),
        (tmp_path, [], "must be a checkpoint that exists"),
        (tmp_path / "deepspeed", ["--strategy", "ddp"], "got the DeepSpeed folder"),
        ("last", [], "loadable checkpoint"),
        (tmp_path / "no_average.ckpt", ["--ema_decay", "0.9"], "--ema_decay"),
        (checkpoints / "last.ckpt", other_base, "of another shape: controlnet_cond_embedding."),
        (checkpoints / "last.ckpt", same_shape, "--pretrained_model_name_or_path must be the base"),
        (checkpoints / "last.ckpt", velocity, "--prediction_type must stay"),
    ):
        command = [*flags, *extra, "--resume_from_checkpoint", str(value)]
        assert_refused(run(command, output_dir=tmp_path / "outputs"), message)
    assert not (tmp_path / "outputs").exists()
