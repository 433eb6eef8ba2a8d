"""The benchmarks run at their smallest size, and fail where they should. No time is asserted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
from benchmarks import coco_like, e2e, limits, memory, overhead, scale, soak, step
from benchmarks import data as data_benchmark
from benchmarks.networks import SIZES, write_base
from benchmarks.timing import Spread, describe_machine, ratios, take_turns
from inpainting.latents import MomentsCache
from lightning_module import InpaintingControlNet
from model import Base, load_base
from tests import commands
from tools import cache_latents

ROOT = Path(__file__).parents[2]
TINY = ["--size", "tiny", "--num_rounds", "2", "--num_steps", "2"]


def rows_of(table: str) -> dict[str, list[str]]:
    """Return each row's cells by its name."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines[1:]}


def test_all_rows_train_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(TINY) == 0
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == [step.REFERENCE, *step.ROWS]
    differences = {name: float(cells[-1]) for name, cells in rows.items()}
    assert differences[step.AGAIN] == 0, "the same code on the same data"
    assert 0 < differences["project, cached"] <= 1e-5, "rounded to float16"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_compiled_rows_train_alike() -> None:
    assert step.main([*TINY, "--num_steps", "20", "--rows", step.REGIONAL, step.FULL]) == 0


def test_all_rows_train_alike_in_bf16() -> None:
    assert step.main([*TINY, "--precision", "bf16-mixed"]) == 0


@pytest.mark.parametrize("row", ["project, nothing cached", "project, cached"])
def test_a_step_that_computes_something_else_is_refused(
    row: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = InpaintingControlNet.loss

    def wrong_loss(self, batch, controlnet) -> torch.Tensor:
        return loss(self, batch, controlnet) * (1 + 1e-4)

    monkeypatch.setattr(InpaintingControlNet, "loss", wrong_loss)
    assert step.main([*TINY, "--rows", row]) == 1
    out, err = capsys.readouterr()
    assert "PARTED" in rows_of(out)[row][-1]
    assert err.startswith("error: ")


def test_what_a_step_must_compute_is_counted_for_one_picture() -> None:
    args = step.build_parser().parse_args(["--size", "tiny", "--image_size", "64"])
    args.rows, counted = ["reference + cached moments"], {}
    for args.batch_size in (1, 3):
        rows = step.build_rows(args)
        reference = rows[step.REFERENCE]
        assert isinstance(reference, step.Reference)
        counted[args.batch_size] = {
            step.is_cached(row): step.count_flops(reference, row.batches[0])
            for row in rows.values()
        }
        assert not reference.losses, "the row itself took no step"
    assert counted[1] == counted[3]
    with FlopCounterMode(display=False) as encoder, sdpa_kernel(SDPBackend.MATH):
        reference.base.encode_image(torch.zeros(1, 3, 64, 64))
    assert counted[1][False] - counted[1][True] == encoder.get_total_flops() > 0


def test_kernels_and_waits_are_told_from_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's profiler names what happens on a GPU; there is none here."""
    gpu, cpu = limits.DeviceType.CUDA, limits.DeviceType.CPU
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    events = [
        SimpleNamespace(name=name, device_type=device, is_user_annotation="#" in name)
        for name, device in (
            ("void gemm", gpu), ("void gemm", gpu), ("Memcpy HtoD", gpu), ("Memset (Device)", gpu),
            ("Optimizer.step#AdamW.step", gpu),
            ("aten::mm", cpu), ("cudaLaunchKernel", cpu), ("cudaStreamSynchronize", cpu),
            ("cudaDeviceSynchronize", cpu),
        )
    ]  # fmt: skip
    profile = nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profile)
    steps = []
    assert limits.count_launches(lambda: steps.append(1)) == (2, 1)
    assert len(steps) == 1


def test_a_cached_step_never_asks_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    args = step.build_parser().parse_args(["--size", "tiny", "--image_size", "64"])
    args.rows = ["project, nothing cached", "project, cached"]
    rows = step.build_rows(args)
    calls = []
    encode_image = Base.encode_image
    monkeypatch.setattr(
        Base, "encode_image", lambda self, image: calls.append(1) or encode_image(self, image)
    )  # fmt: skip
    for _ in range(step.NUM_BATCHES):
        rows["project, cached"].step()
    assert not calls
    rows["project, nothing cached"].step()
    assert calls == [1]


def measure_memory(
    capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, dict[str, list[str]]]:
    code = memory.main(["--size", "tiny", *flags])
    return code, rows_of(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("precision", "saved_mib", "shares"),
    [("32", 2.7, [1.0, 0.915, 0.818]), ("bf16-mixed", 2.3, [1.0, 0.882, 0.825])],
)
def test_checkpointing_saves_so_much_and_changes_nothing(
    precision: str, saved_mib: float, shares: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """At this size most of the bytes are the hint encoder's, which are kept either way."""
    code, rows = measure_memory(capsys, "--precision", precision)
    assert code == 0
    found = [rows[setting] for setting in memory.SETTINGS]
    assert float(found[0][0]) == pytest.approx(saved_mib, rel=0.02)
    assert [float(cells[1]) for cells in found] == pytest.approx(shares, abs=0.01)
    assert [cells[3] for cells in found] == ["0.0e+00"] * 3, "the same bits"
    assert float(rows["optimizer"][0]) == pytest.approx(2 * float(rows["ControlNet"][0]), abs=0.2)


def test_saved_bytes_grow_with_the_batch_alone(capsys: pytest.CaptureFixture[str]) -> None:
    _, one = measure_memory(capsys)
    _, three = measure_memory(capsys, "--batch_size", "3")
    for setting in memory.SETTINGS:
        assert float(three[setting][0]) == pytest.approx(3 * float(one[setting][0]), rel=0.02)
    assert one["together"] == three["together"]


def test_what_is_saved_is_counted_once_and_without_parameters() -> None:
    layer = torch.nn.Linear(4, 4)
    x = torch.ones(8, 4, requires_grad=True)
    with memory.count_saved([layer]) as saved:
        y = layer(x)
        (y * y).sum()  # y twice, x, the weight
    assert sum(storage.nbytes() for storage in saved.values()) == 2 * 8 * 4 * 4


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_shapes_alone_tell_what_is_saved(
    precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, computed = measure_memory(capsys, "--precision", precision)
    code, counted = measure_memory(capsys, "--precision", precision, "--shapes_only")
    assert code == 0
    for setting in memory.SETTINGS:
        assert counted[setting][:2] == computed[setting][:2]
        assert counted[setting][2:] == ["not measured", "not computed"]


def test_a_setting_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_project = memory.build_project

    def spoiled(*args, gradient_checkpointing: bool, **kwargs) -> step.Project:
        project = build_project(*args, gradient_checkpointing=gradient_checkpointing, **kwargs)
        if gradient_checkpointing:
            project.batches[0]["noise"] = project.batches[0]["noise"] * 1.01
        return project

    monkeypatch.setattr(memory, "build_project", spoiled)
    code, rows = measure_memory(capsys)
    assert code == 1
    assert ["PARTED" in rows[setting][-1] for setting in memory.SETTINGS] == [False, False, True]


def test_rows_take_turns_in_alternating_order() -> None:
    order: list[str] = []
    rows = {name: lambda name=name: order.append(name) for name in "abc"}
    times = take_turns(rows, num_rounds=3, device=torch.device("cpu"))
    assert "".join(order) == "cba" + "abc" + "cba" + "abc", "the first round warms up"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_spreads_and_ratios() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(2.0, 3.0, 4.0)
    assert ratios([2.0, 4.0], [1.0, 4.0]) == [2.0, 1.0]
    assert str(Spread(1.0, 2.0, 3.0)) == "2.000 (1.000-3.000)"


def test_the_stages_of_a_sample_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--image_size", "64", "--num_samples", "4", "--num_scenes", "2", "--scene_size", "80"]
    assert data_benchmark.main(flags) == 0
    out = capsys.readouterr().out
    medians = {name: float(cells[0].split()[0]) for name, cells in rows_of(out).items()}
    assert medians.keys() == {*data_benchmark.STAGES, data_benchmark.REST, "total"}
    # What goes to the device: picture, mask, tokens, timestep, two noises, moments, id.
    expected = 3 * 64 * 64 + 64 * 64 + 77 * 8 + 8 + 2 * 4 * 8 * 8 * 4 + 8 * 8 * 8 * 2 + 8
    assert re.search(r"([\d,]+) bytes per sample", out)[1] == f"{expected:,}"  # type: ignore[index]


class SlowPictures(torch.utils.data.Dataset):
    """Takes 50 ms for a sample, which says where it was asked for."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, address: tuple[int, int]) -> torch.Tensor:
        assert address in [(0, 0), (0, 1), (0, 2), (1, 0)], "what has moments in the cache"
        time.sleep(0.05)
        return torch.tensor(address)


def test_a_training_waits_for_what_its_workers_cannot_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    slow: Any = SlowPictures()
    share = data_benchmark.measure_waiting(
        slow, num_filled=4, batch_size=2, num_workers=1, samples_per_s=1000, seconds=0.02
    )
    assert 0.5 < share < 1, "2 ms of steps in 102 ms; a busy machine makes them longer"
    flags = ["--num_scenes", "2", "--num_samples", "4", "--image_size", "64", "--num_workers", "1"]
    assert data_benchmark.main([*flags, "--samples_per_s", "8", "--seconds", "1"]) == 0
    said = re.search(
        r"a training of 8 samples/s, .* 1 workers (\d+\.\d\d)%", capsys.readouterr().out
    )
    assert said is not None
    assert float(said[1]) < 90


def test_a_stage_within_a_stage_counts_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """_read_moments calls nothing that is timed but tag_pixels."""
    cache = MomentsCache(tmp_path, image_ids=np.array([1]), moments_shape=(8, 2, 2))
    ticks = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr(data_benchmark.time, "thread_time", lambda: next(ticks))
    places = {name: (data, name) for name in ("_read_moments", "tag_pixels")}
    with data_benchmark.timed_stages(places) as stages:
        data._read_moments(cache, row=0, view=0, image=np.zeros((16, 16, 3), np.uint8))
    assert stages == {"tag_pixels": 2000.0, "_read_moments": 8000.0}


def test_the_loop_is_measured_against_a_raw_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--num_rounds", "1", "--num_steps", "4"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == [
        "Lightning with bar, curves and checkpoints", "raw", "what the first costs more"
    ]  # fmt: skip


def test_data_like_coco_are_sound_and_have_its_statistics(tmp_path: Path) -> None:
    folder = coco_like.write_coco_like(tmp_path / "data", num_pictures=400)
    index = scale.open_index(folder, tmp_path / "cache")
    assert len(index) == 400
    assert not index.problems
    num_records = index.num_rows_read["annotations"]
    assert num_records / 400 == pytest.approx(coco_like.RECORDS_PER_PICTURE, rel=0.1)
    rows = json.loads((folder / "annotations" / "instances.json").read_text())["annotations"]
    shapes = [row["segmentation"] for row in rows if not row["iscrowd"]]
    points = [len(polygon) // 2 for polygons in shapes for polygon in polygons]
    assert np.median(points) == pytest.approx(coco_like.MEDIAN_POINTS, abs=1)
    assert np.mean(points) == pytest.approx(coco_like.MEAN_POINTS, rel=0.1)
    picture, again = index.open_picture(0), index.open_picture(coco_like.NUM_DRAWN)
    assert picture.size == (coco_like.WIDTH, coco_like.HEIGHT)
    assert picture.tobytes() == again.tobytes(), "a link to the same one"


def test_a_data_sets_size_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num_pictures", "8", "16", "--num_workers", "1", "--num_rounds", "1"]
    assert scale.main([*flags, "--num_samples", "2", "--work_dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in out.splitlines() if line[:3] in ("| 8", "| 1")] == [
        "| 8", "| 16"] * 3  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_soak_needs_a_folder_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "straight").mkdir()
    assert soak.main(["--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: --output_dir must be empty, got {tmp_path}. Remove it, or name another.\n"
    )


@pytest.mark.parametrize(
    ("saved", "before", "logged", "is_fine"),
    [(6, 3, 6, True), (6, 6, 9, True), (6, 9, 9, False), (6, 3, 10, False)],
)
def test_a_kill_may_cost_the_steps_since_the_last_save_alone(
    saved: int, before: int, logged: int, is_fine: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert soak.SAVE_EVERY_N_STEPS == 3
    monkeypatch.setattr(soak, "read_checkpoint", lambda path: {"global_step": saved})
    monkeypatch.setattr(soak, "read_curves", lambda run_dir: {"train/loss": {logged: 0.1}})
    if is_fine:
        assert soak.check_after_kill(tmp_path, step_before=before) == saved
        return
    with pytest.raises(ValueError, match=f"last.ckpt holds step {saved}, after {before}, {logged}"):
        soak.check_after_kill(tmp_path, step_before=before)


# Stands for a command: notes what it was given, and burns 200 ms of a child's CPU time a step.
FAKE = """
import json, os, subprocess, sys
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
num_steps = int(flags.get("--max_train_steps") or flags.get("--max_steps") or 0)
given = {"name": Path(sys.argv[0]).name, "flags": flags, "num_steps": num_steps}
given["environment"] = dict(os.environ)
data = Path(flags["--pretrained_model_name_or_path"]).parent / "data"
given["rows"] = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
with Path(LOG).open("a") as log:
    log.write(json.dumps(given) + "\\n")
burn = f"import time\\nwhile time.process_time() < {num_steps * 0.2}: pass"
subprocess.run([sys.executable, "-S", "-c", burn], check=True)
if "--output_dir" in flags:
    Path(flags["--output_dir"]).mkdir()
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the script that stands for the peer's, and draw small scenes."""
    path = tmp_path / "train_controlnet.py"
    path.write_text(FAKE.replace("LOG", repr(str(tmp_path / "log"))))
    monkeypatch.setattr(e2e, "SCENE_SIZE_PX", 64)
    return path


def e2e_flags(peer: Path, *flags: str) -> list[str]:
    """Return the flags of a comparison in this interpreter."""
    return ["--peer", str(peer), "--python", sys.executable, "--size", "tiny", *flags]


def test_whole_runs_are_compared_by_their_difference(
    peer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = peer.parent / "project"
    (root / "tools").mkdir(parents=True)
    for name in ("train_lightning.py", "tools/cache_latents.py"):
        shutil.copy(peer, root / name)
    monkeypatch.setattr(e2e, "ROOT", root)
    flags = e2e_flags(peer, "--num_rounds", "2", "--num_steps", "1", "3", "--batch_size", "2")
    assert e2e.main(flags) == 0
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert list(rows) == [e2e.PEER, e2e.AGAIN, e2e.NOT_CACHED, e2e.CACHED]
    for name, (per_step, *_) in rows.items():
        assert 180 < float(per_step.split()[0]) < 250, f"{name}: 200 ms a step, got {per_step}"
    assert "tiny, 64 px, batch 2, fp32, 2 rounds of 1 and 3 steps" in out
    assert "1 thread(s), torch 2." in out

    runs = [json.loads(line) for line in (peer.parent / "log").read_text().splitlines()]
    theirs, ours, filling = peer.name, "train_lightning.py", "cache_latents.py"
    warm_up = [(theirs, 1), (filling, 0), (ours, 1)]
    in_order = [(theirs, 1), (theirs, 3)] * 2 + [(ours, 1), (ours, 3)] * 2
    in_reverse = [(ours, 1), (ours, 3)] * 2 + [(theirs, 1), (theirs, 3)] * 2
    assert [(run["name"], run["num_steps"]) for run in runs] == warm_up + in_order + in_reverse
    shared = {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    assert all(shared.items() <= run["environment"].items() for run in runs)
    their_flags, our_flags = runs[0]["flags"], runs[2]["flags"]
    for their_name, our_name in (
        ("resolution", "image_size"), ("train_batch_size", "batch_size"),
        ("dataloader_num_workers", "num_workers"), ("learning_rate", "learning_rate"),
        ("lr_scheduler", "lr_scheduler"), ("proportion_empty_prompts", "empty_prompt_prob"),
        ("pretrained_model_name_or_path", "pretrained_model_name_or_path"), ("seed", "seed"),
        ("checkpointing_steps", "save_every_n_steps"),
    ):  # fmt: skip
        assert their_flags[f"--{their_name}"] == our_flags[f"--{our_name}"]
    assert (their_flags["--mixed_precision"], our_flags["--precision"]) == ("no", "32")
    assert len(runs[0]["rows"]) == 2 * (3 + 1), "no epoch ends within a run"


def test_our_command_encodes_pictures_only_in_the_row_without_a_cache(
    peer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = peer.parent / "place"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    args = e2e.build_parser().parse_args(e2e_flags(peer, "--image_size", "64"))
    args.num_steps = (1, 3)
    place = e2e.Place(folder, args)
    e2e.prepare(place)
    _, tool, *flags = place.fill()
    assert tool == "tools.cache_latents"
    assert cache_latents.main(flags) == 0
    for row, code in ((e2e.CACHED, 0), (e2e.NOT_CACHED, 1)):
        result = commands.run(
            [*place.commands()[row][1:], "3"], output_dir=folder / f"outputs_{code}",
            deaths=[commands.Fault("model:Base.encode_image")],
            environment={"XDG_CACHE_HOME": str(folder / "cache")},
        )  # fmt: skip
        assert result.code == code, f"{row}:\n{result.output}"


def test_a_run_that_fails_ends_the_comparison_with_its_last_lines(
    peer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.write_text("raise SystemExit('no torchvision here')")
    flags = e2e_flags(peer, "--num_rounds", "1", "--num_steps", "1", "2")
    assert e2e.main(flags) == 1
    out, err = capsys.readouterr()
    assert "|" not in out
    assert f"error: a run of {peer} ended with exit code 1." in err
    assert err.endswith("no torchvision here\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peer", "nowhere.py"], "error: --peer must be diffusers' train_controlnet.py, got "
         "nowhere.py, which isn't there."),
        (["--python", "nowhere"], "error: --python must be an interpreter with torchvision and "
         "datasets, got nowhere, which isn't there. `make bench-env` makes one."),
        (["--num_steps", "4", "4"], "error: --num_steps must be a short and a long run, got 4 and "
         "4. Try 10 50."),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_one_line(
    flags: list[str], message: str, peer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert e2e.main(e2e_flags(peer, *flags)) == 2
    err = capsys.readouterr().err
    assert err.startswith(message), err
    assert err.count("\n") == 1, err


def test_the_peers_pictures_are_ours_with_holes_painted_beforehand(tmp_path: Path) -> None:
    e2e.write_scenes(tmp_path, num_scenes=2, size=64, seed=0)
    before = [path.read_bytes() for path in sorted((tmp_path / "images").iterdir())]
    e2e.write_peer_data(tmp_path)
    assert [path.read_bytes() for path in sorted((tmp_path / "images").iterdir())] == before
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        with Image.open(tmp_path / row["conditioning_image_file_name"]) as file:
            assert file.format == "JPEG"
            painted = np.asarray(file).astype(int)
        with Image.open(tmp_path / row["file_name"]) as file:
            picture = np.asarray(file.convert("RGB")).astype(int)
        assert painted[20:28, 20:28].mean() < 8, "the hole is black"
        assert picture[20:28, 20:28].mean() > 40
        assert np.abs(painted - picture)[40:].mean() < 20, "all else is the picture, after JPEG"


def test_the_written_base_is_one_that_trains(tmp_path: Path) -> None:
    base = load_base(str(write_base(tmp_path / "base", SIZES["tiny"], image_size=64)))
    assert base.image_size == 64
    assert base.text_encoder.config.vocab_size == len(base.tokenizer)


def test_a_measured_environment_is_described_by_its_own_versions() -> None:
    cpu = torch.device("cpu")
    described = describe_machine(cpu, num_threads=7, versions={"torch": "1.0", "datasets": "5.2"})
    assert ", 7 thread(s), torch 1.0, datasets 5.2, commit " in described
    assert f"torch {torch.__version__}, commit" in describe_machine(cpu)


def test_the_benchmarks_environment_is_made_outside_of_the_project(tmp_path: Path) -> None:
    printed = subprocess.run(
        ["make", "--dry-run", "bench-env"],
        cwd=ROOT, env={"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    folder = tmp_path / "controlnet-inpainting" / "bench-env"
    assert (
        f"{folder}/bin/python -m pip install --quiet -r benchmarks/requirements-e2e.txt" in printed
    )
    assert "-r ../requirements.txt" in (ROOT / "benchmarks" / "requirements-e2e.txt").read_text()
