"""A run's folder: its own, found again, and read without running code."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from inpainting.runs import (
    CHECKPOINT_PARTS,
    RUN_PREFIX,
    RunLog,
    adopt_checkpoint,
    check_deepspeed_shape,
    check_output_dir,
    check_strategy_can_read,
    find_checkpoint,
    is_first_process,
    lock_run_dir,
    new_run_dir,
    read_checkpoint,
    read_run_state,
    run_dir_of,
    write_run_json,
)

CHECKPOINT = {
    **{part: {} for part in CHECKPOINT_PARTS},
    "state_dict": {"controlnet.x": torch.arange(4096.0)},
    "global_step": 3,
}


def write_checkpoint(path: Path, *, age_s: float = 0.0, step: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**CHECKPOINT, "global_step": step}, path)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def run(output_dir: Path, name: str) -> Path:
    return output_dir / f"{RUN_PREFIX}{name}" / "checkpoints"


# ---- the folder


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20300101_000000")
    folders = [new_run_dir(tmp_path / "outputs") for _ in range(4)]
    assert [folder.name for folder in folders] == [
        RUN_PREFIX + "20300101_000000" + suffix for suffix in ("", "_2", "_3", "_4")
    ]
    assert all(folder.is_dir() for folder in folders)


def test_an_output_dir_below_a_file_is_an_error_of_the_users(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((NotADirectoryError, FileExistsError), match="file"):
        new_run_dir(tmp_path / "file" / "outputs")


def test_an_output_dir_that_cant_be_is_refused(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(NotADirectoryError, match=r"must be a folder, got the file .*file\."):
            check_output_dir(path)
    check_output_dir(tmp_path / "new" / "one")
    assert not (tmp_path / "new").exists()
    monkeypatch.chdir(tmp_path)
    check_output_dir(Path("outputs"))
    with pytest.raises(PermissionError, match=r"can be written to, got /proc/x \(No such file"):
        check_output_dir(Path("/proc/x"))


def test_a_run_folder_has_one_run_at_a_time(tmp_path) -> None:
    lock_run_dir(tmp_path)
    with pytest.raises(BlockingIOError, match=r"no other run going on in it, got .*Stop that run"):
        lock_run_dir(tmp_path)  # flock knows no difference between this process and another
    (tmp_path / "run.log").unlink()
    lock_run_dir(tmp_path)


def test_run_log_is_begun_again_where_it_was_deleted(tmp_path) -> None:
    log = RunLog(tmp_path / "run")
    say = logging.LogRecord
    log.emit(say("name", logging.INFO, "", 0, "one", None, None))
    shutil.rmtree(tmp_path / "run")
    log.emit(say("name", logging.INFO, "", 0, "two", None, None))
    log.close()
    assert (tmp_path / "run" / "run.log").read_text().endswith(" INFO two\n")


def test_a_checkpoints_flags_win_over_run_jsons_and_paths_come_from_there(tmp_path) -> None:
    path = run(tmp_path, "1") / "last.ckpt"
    write_checkpoint(path)
    torch.save({**CHECKPOINT, "run": {"flags": {"seed": 1}, "facts": {"torch": "2"}}}, path)
    assert read_run_state(path) == {"flags": {"seed": 1}, "facts": {"torch": "2"}}
    write_run_json(path.parents[1], arguments={"seed": 2, "image_dir": "/pictures"}, record={})
    assert read_run_state(path)["flags"] == {"seed": 1, "image_dir": "/pictures"}


def test_run_json_names_the_origin_of_a_moved_checkpoint(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = write_run_json(tmp_path, arguments={}, record={}, origin=Path("moved.ckpt"))
    assert (tmp_path / "run.json").read_text() == text
    assert json.loads(text)["origin"] == str(tmp_path / "moved.ckpt")


def test_a_checkpoints_run_is_the_folder_with_its_run_json(tmp_path, monkeypatch) -> None:
    path = write_checkpoint(run(tmp_path, "1") / "last.ckpt")
    assert run_dir_of(path) is None
    (path.parents[1] / "run.json").write_text("{}")
    assert run_dir_of(path) == path.parents[1]
    assert run_dir_of(write_checkpoint(tmp_path / "moved.ckpt")) is None
    monkeypatch.chdir(path.parent)
    assert run_dir_of(Path("last.ckpt")) == path.parents[1]


@pytest.mark.parametrize(
    ("environment", "is_first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1"}, False),
        ({"LOCAL_RANK": "1"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_only_rank_0_is_the_first_process(monkeypatch, environment, is_first) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is is_first


# ---- finding a checkpoint


def test_last_is_the_newest_checkpoint_of_all_runs(tmp_path) -> None:
    write_checkpoint(run(tmp_path, "3") / "last.ckpt", age_s=30)
    newest = write_checkpoint(run(tmp_path, "1") / "last.ckpt", age_s=10)
    write_checkpoint(run(tmp_path, "2") / "last.ckpt", age_s=20)
    write_checkpoint(tmp_path / "something_else" / "checkpoints" / "last.ckpt")
    assert find_checkpoint("last", output_dir=tmp_path) == newest


def test_last_passes_over_what_cant_be_loaded(tmp_path) -> None:
    good = write_checkpoint(run(tmp_path, "1") / "last.ckpt", age_s=100)
    torn = write_checkpoint(run(tmp_path, "2") / "last.ckpt", age_s=10)
    torn.write_bytes(torn.read_bytes()[:-5000])
    (run(tmp_path, "3")).mkdir(parents=True)
    (run(tmp_path, "3") / "last.ckpt").touch()
    torch.save({"x": torch.zeros(3)}, run(tmp_path, "3") / "weights.ckpt")
    (run(tmp_path, "4") / "half.ckpt").mkdir(parents=True)  # DeepSpeed, killed while writing
    assert find_checkpoint("last", output_dir=tmp_path) == good


def test_last_passes_over_a_link_to_nothing(tmp_path) -> None:
    good = write_checkpoint(run(tmp_path, "1") / "last.ckpt", age_s=100)
    run(tmp_path, "2").mkdir(parents=True)
    (run(tmp_path, "2") / "last.ckpt").symlink_to("last.a")
    assert find_checkpoint("last", output_dir=tmp_path) == good


def test_last_prefers_last_ckpt_to_a_named_one_of_the_same_step(tmp_path) -> None:
    last = write_checkpoint(run(tmp_path, "1") / "last.ckpt", age_s=5, step=7)
    named = write_checkpoint(run(tmp_path, "1") / "controlnet-epoch=00.ckpt", age_s=1, step=7)
    assert find_checkpoint("last", output_dir=tmp_path) == last
    write_checkpoint(named, age_s=1, step=8)
    assert find_checkpoint("last", output_dir=tmp_path) == named


def test_no_checkpoint_at_all_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"last needs a run .*, got none under"):
        find_checkpoint("last", output_dir=tmp_path / "nowhere")


def test_a_named_checkpoint_is_taken_as_it_is(tmp_path) -> None:
    path = write_checkpoint(tmp_path / "moved.ckpt")
    assert find_checkpoint(str(path), output_dir=tmp_path / "outputs") == path
    with pytest.raises(FileNotFoundError, match=r"a checkpoint that exists, got .*no\.ckpt"):
        find_checkpoint(str(tmp_path / "no.ckpt"), output_dir=tmp_path)


def test_a_deepspeed_checkpoint_is_a_folder_with_a_marker_that_is_written_last(tmp_path) -> None:
    (tmp_path / "last.a" / "checkpoint").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"must be a checkpoint that exists, got .*last\.a"):
        read_checkpoint(tmp_path / "last.a")
    (tmp_path / "last.a" / "latest").write_text("checkpoint")
    assert read_checkpoint(tmp_path / "last.a") == {}


@pytest.mark.parametrize(
    ("is_folder", "strategy", "got"),
    [
        (True, "ddp", "got the DeepSpeed folder"),
        (True, "auto", "got the DeepSpeed folder"),
        (False, "deepspeed_stage_2", "got a file, not a DeepSpeed folder"),
    ],
)
def test_a_checkpoint_of_the_other_kind_of_strategy_is_refused(
    tmp_path, is_folder, strategy, got
) -> None:
    path = tmp_path / "last.ckpt"
    path.mkdir() if is_folder else path.touch()
    with pytest.raises(ValueError, match=rf"--strategy {strategy} must get .*, {got}.*last\.ckpt"):
        check_strategy_can_read(path, strategy=strategy)
    check_strategy_can_read(path, strategy="deepspeed" if is_folder else "ddp")


@pytest.mark.parametrize(
    ("stage", "strategy", "world_size", "message"),
    [
        (2, "deepspeed_stage_2", 2, None),
        (2, "deepspeed_stage_1", 2, None),
        (3, "deepspeed_stage_3_offload", 2, None),
        (2, "deepspeed_stage_2", 4, r"was written by, 2, got 4\. Set --devices"),
        (3, "deepspeed_stage_3", 1, r"was written by, 2, got 1\. Set --devices"),
        (2, "deepspeed_stage_3", 2, r"written by, 1 or 2, got --strategy deepspeed_stage_3"),
        (3, "deepspeed", 2, r"was written by, 3, got --strategy deepspeed\."),
    ],
)
def test_a_deepspeed_checkpoint_goes_on_with_its_stage_and_its_number_of_processes(
    tmp_path, stage, strategy, world_size, message
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    models = ["mp_rank_00"] if stage == 2 else [f"zero_pp_rank_{i}_mp_rank_00" for i in range(2)]
    for name in models:
        (folder / f"{name}_model_states.pt").touch()
    for i in range(2):
        (folder / f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt").touch()
    if message is None:
        check_deepspeed_shape(tmp_path, strategy=strategy, world_size=world_size)
        return
    with pytest.raises(ValueError, match=message):
        check_deepspeed_shape(tmp_path, strategy=strategy, world_size=world_size)


def test_a_moved_checkpoint_is_the_new_runs_own_at_once(tmp_path) -> None:
    moved = write_checkpoint(tmp_path / "moved.ckpt")
    adopt_checkpoint(moved, run_dir=tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert last.read_bytes() == moved.read_bytes()
    assert not last.is_symlink(), "the original may be deleted"

    (tmp_path / "old" / "last.a").mkdir(parents=True)
    (tmp_path / "old" / "last.a" / "latest").write_text("checkpoint")
    (tmp_path / "old" / "last.ckpt").symlink_to("last.a")
    adopt_checkpoint(tmp_path / "old" / "last.ckpt", run_dir=tmp_path / "deepspeed")
    last = tmp_path / "deepspeed" / "checkpoints" / "last.ckpt"
    assert last.readlink() == Path("last.a")
    assert read_checkpoint(last) == {}


# ---- reading a checkpoint


def test_a_checkpoint_is_read_as_it_was_written(tmp_path) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "a.ckpt"))
    assert checkpoint["global_step"] == 3
    assert torch.equal(checkpoint["state_dict"]["controlnet.x"], torch.arange(4096.0))


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path, content) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.ckpt must be a training checkpoint, got a f") as e:
        read_checkpoint(tmp_path / "a.ckpt")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"x": torch.zeros(1)}, [1, 2], 3])
def test_other_weights_are_sent_to_their_own_flag(tmp_path, content) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"got other weights \(no .*use --controlnet_weights"):
        read_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("part", CHECKPOINT_PARTS)
def test_a_checkpoint_without_what_a_resume_needs_is_refused(tmp_path, part) -> None:
    torch.save({k: v for k, v in CHECKPOINT.items() if k != part}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"got other weights \(no {part}\)"):
        read_checkpoint(tmp_path / "a.ckpt")


class Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_malicious_checkpoint_is_refused_and_runs_nothing(tmp_path) -> None:
    torch.save({**CHECKPOINT, "callbacks": Malice(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt must be a training checkpoint"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file was harmless: the test proved nothing"


# ---- run.json


def test_run_json_says_what_the_run_is(tmp_path) -> None:
    write_run_json(tmp_path, arguments={"seed": 1, "name": "größe"}, record={"image_size": 64})
    run_json = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert run_json["arguments"] == {"seed": 1, "name": "größe"}
    assert run_json["inpainting"] == {"image_size": 64}
    assert torch.__version__.startswith(run_json["versions"]["torch"].split("+")[0])
    assert run_json["history"] == []
    assert set(run_json) == {
        "started", "arguments", "inpainting", "versions", "git_commit", "history",
    }  # fmt: skip


def test_run_json_keeps_what_the_run_was_before_it_was_resumed(tmp_path) -> None:
    for seed in range(3):
        write_run_json(tmp_path, arguments={"seed": seed}, record={})
    run_json = json.loads((tmp_path / "run.json").read_text())
    assert run_json["arguments"] == {"seed": 2}
    assert [entry["arguments"] for entry in run_json["history"]] == [{"seed": 0}, {"seed": 1}]
    assert all("history" not in entry for entry in run_json["history"])
