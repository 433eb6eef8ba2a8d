"""train_lightning.py as a user types it: what a run leaves, shows and refuses."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import signal
import stat
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_lightning
from model import build_controlnet
from tests import tiny
from tests.commands import Result, run, run_typed


def read_events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir), size_guidance={"images": 0, "scalars": 0}).Reload()


def read_curve(run_dir: Path, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in read_events(run_dir).Scalars(tag)}


def read_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "final_model" / "controlnet.pth", weights_only=True)


@pytest.fixture(scope="module")
def trained(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One run of 2 epochs, typed into a fresh interpreter, with an average and a schedule."""
    output_dir = tmp_path_factory.mktemp("trained") / "outputs"
    code, stdout, stderr = run_typed(
        ["train_lightning.py", *flags, "--num_epochs", "2", "--ema_decay", "0.5",
         "--lr_scheduler", "cosine", "--lr_warmup_steps", "4", "--log_every_n_steps", "2",
         "--log_images_every_n_steps", "4", "--output_dir", output_dir]
    )  # fmt: skip
    assert code == 0, stdout + stderr
    assert "Warning" not in stderr, stderr
    return Result(code, stdout + stderr, output_dir)


def test_a_run_leaves_exactly_the_promised_tree(trained: Result) -> None:
    run_dir = trained.run_dir
    assert re.fullmatch(r"controlnet_inpainting_lightning_\d{8}_\d{6}", run_dir.name)
    files = sorted(str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file())
    patterns = [
        r"checkpoints/controlnet-epoch=00-train_loss=\d\.\d{4}\.ckpt",
        r"checkpoints/controlnet-epoch=01-train_loss=\d\.\d{4}\.ckpt",
        r"checkpoints/last\.ckpt",
        r"events\.out\.tfevents\..*",
        r"final_model/README\.md",
        r"final_model/config\.json",
        r"final_model/controlnet\.pth",
        r"final_model/diffusion_pytorch_model\.safetensors",
        r"final_model/inpainting\.json",
        r"run\.json",
        r"run\.log",
    ]
    assert len(files) == len(patterns), files
    for file, pattern in zip(files, patterns, strict=True):
        assert re.fullmatch(pattern, file), f"{file} isn't {pattern}"
        assert stat.S_IMODE((run_dir / file).stat().st_mode) == 0o644, file


def test_run_json_and_run_log_tell_what_the_run_was(trained: Result) -> None:
    run_json = json.loads((trained.run_dir / "run.json").read_text())
    assert run_json.keys() == {
        "started", "arguments", "inpainting", "versions", "git_commit", "history"
    }  # fmt: skip
    arguments = run_json["arguments"]
    assert arguments["image_size"] == 64
    assert arguments["precision"] == "32"
    assert arguments["prediction_type"] == "epsilon"
    assert Path(arguments["image_dir"]).is_absolute()
    assert run_json["versions"]["torch"] == version("torch")
    log = (trained.run_dir / "run.log").read_text()
    assert "10 pictures train, 2 validate; 5 optimizer steps per epoch" in log
    assert "done: 10 steps" in log


def test_a_checkpoint_holds_the_controlnet_its_average_and_the_optimizer_alone(
    trained: Result,
) -> None:
    weights = read_weights(trained.run_dir)
    checkpoint = torch.load(trained.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"controlnet.{name}" for name in weights}
    assert set(checkpoint["average"]) == set(weights)
    # Weights, average and Adam's two moments, and little else.
    size = sum(tensor.nbytes for tensor in weights.values())
    for path in (trained.run_dir / "checkpoints").iterdir():
        assert path.stat().st_size < 4.3 * size, path
    # The export is the average, which isn't where the parameters are.
    assert all(torch.equal(checkpoint["average"][name], weights[name]) for name in weights)
    assert any(
        not torch.equal(checkpoint["state_dict"][f"controlnet.{name}"], weights[name])
        for name in weights
    )


def test_diffusers_reads_final_model_without_a_warning(trained: Result, tmp_path: Path) -> None:
    folder = trained.run_dir / "final_model"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controlnet, info = ControlNetModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    weights = read_weights(trained.run_dir)
    assert all(torch.equal(weights[name], t) for name, t in controlnet.state_dict().items())

    fresh = build_controlnet(tiny.base().unet, stride=8)
    fresh.save_pretrained(tmp_path)
    assert (folder / "config.json").read_text() == (tmp_path / "config.json").read_text()

    record = json.loads((folder / "inpainting.json").read_text())
    assert record["image_size"] == 64
    assert record["is_average"] is True
    assert record["global_step"] == 10
    assert record["base"] == tiny.base_folder().name
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert str(record["base_unet_sha256"]) in json.dumps(file.metadata())
    for path in folder.iterdir():
        assert str(tiny.base_folder()).encode() not in path.read_bytes(), path


def test_tensorboard_shows_curves_and_pictures_at_their_steps(trained: Result) -> None:
    events = read_events(trained.run_dir)
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "train/lr", "train/grad_norm", "train/samples_per_second",
        "val/loss", "val/loss_hole", "val/loss_known", "val/loss_base", "val/control_gain",
        "val/psnr_hole", "val/loss_t000_250", "val/loss_t500_750",  # two pictures, two bands
    }  # fmt: skip
    for tag in ("train/loss", "train/lr", "train/grad_norm", "train/samples_per_second"):
        curve = read_curve(trained.run_dir, tag)
        assert sorted(curve) == [2, 4, 5, 6, 8, 10], tag  # every second step and each epoch's end
        assert all(math.isfinite(value) and value > 0 for value in curve.values()), curve
    for tag in events.Tags()["scalars"]:
        if tag.startswith("val/"):
            assert sorted(read_curve(trained.run_dir, tag)) == [5, 10], tag
    base = read_curve(trained.run_dir, "val/loss_base")
    assert base[5] == base[10], "the frozen base never changes"
    for step, gain in read_curve(trained.run_dir, "val/control_gain").items():
        loss = read_curve(trained.run_dir, "val/loss")[step]
        assert gain == pytest.approx(1 - loss / base[step], abs=1e-6), step
    # Step n takes the rate of n - 1 finished steps: warm-up over 4, then half a cosine over 6.
    rates = [n / 4 for n in range(4)] + [(1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)]
    for step, rate in read_curve(trained.run_dir, "train/lr").items():
        assert rate == pytest.approx(1e-3 * rates[step - 1], rel=1e-5), step

    steps = {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}
    training, validation = [1, 4, 8], [5, 10]
    assert steps == {
        "train/original": training, "train/masked": training, "train/mask": training,
        "val/original": validation, "val/masked": validation, "val/inpainted": validation,
    }  # fmt: skip
    pictures = {}
    for tag in steps:
        picture = Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string))
        assert picture.size == (2 * 64, 64), tag
        pictures[tag] = np.asarray(picture.convert("RGB"))
    keep = pictures["train/mask"] == 0
    assert 0.1 <= 1 - keep.mean() <= 0.3
    assert np.array_equal(pictures["train/masked"][keep], pictures["train/original"][keep])
    assert (pictures["train/masked"][~keep] == 128).all()
    hole = (pictures["val/masked"] == 128).all(axis=-1)
    assert np.array_equal(pictures["val/inpainted"][~hole], pictures["val/original"][~hole])


@pytest.mark.parametrize(
    ("monitor", "best"), [(None, min), ("val/psnr_hole", max), ("val/control_gain", max)]
)
def test_the_monitor_ranks_the_checkpoints(
    monitor: str | None, best: Callable[..., int], flags: list[str], output_dir: Path
) -> None:
    result = run(
        [*flags, "--num_epochs", "3", "--save_every_n_epochs", "1", "--save_top_k", "1",
         *(["--monitor", monitor] if monitor else [])],
        output_dir=output_dir,
    )  # fmt: skip
    assert result.code == 0, result.output
    curve = read_curve(result.run_dir, monitor or "val/loss")
    assert len(set(curve.values())) == 3, curve
    [kept] = (result.run_dir / "checkpoints").glob("controlnet-*.ckpt")
    epoch = best(curve, key=curve.__getitem__) // 5 - 1
    assert re.fullmatch(rf"controlnet-epoch=0{epoch}-train_loss=\d\.\d{{4}}\.ckpt", kept.name)


def test_a_run_that_ends_before_the_first_point_has_one(flags: list[str], output_dir: Path) -> None:
    warm_up = ["--lr_scheduler", "cosine", "--lr_warmup_steps", "2"]
    result = run([*flags, "--max_steps", "2", *warm_up], output_dir=output_dir)
    assert result.code == 0, result.output
    assert "--lr_warmup_steps 2 isn't over before the run's 2 steps are" in result.output
    assert list(read_curve(result.run_dir, "train/loss")) == [2]
    assert list(read_curve(result.run_dir, "train/lr")) == [2]


def test_the_bar_and_the_last_lines_read_as_promised(trained: Result) -> None:
    bar = r"Epoch 1: 100%\|█+\| 5/5 \[\d\d:\d\d<00:00, .*loss=\d\.\d{4}, lr=[\d.e-]+, v_num=0\]"
    assert re.search(bar, trained.output), trained.output
    *_, done, watch, infer = trained.output.strip().splitlines()
    assert done == f"done: 10 steps; results: {trained.run_dir}"
    assert watch == f"watch: tensorboard --logdir {trained.output_dir}"
    assert infer == (
        f"fill a hole: python infer.py --checkpoint_path {trained.run_dir}/final_model/"
        "controlnet.pth --input_image test.jpg --input_mask mask.png"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--image_size", "65"], "--image_size must be a multiple of 8"),
        (["--image_size", "0"], "--image_size must be"),
        (["--image_dir", "missing"], "--image_dir must be a folder"),
        (["--ann_file", "missing.json"], "--ann_file must exist"),
        (["--ann_file", "README.md"], "README.md"),
        (["--pretrained_model_name_or_path", "./missing"], "./missing"),
        (["--pretrained_model_name_or_path", "some/base"], "some/base"),
        (["--controlnet_weights", "README.md"], "README.md"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--batch_size", "11"], "--batch_size"),
        (["--batch_size", "four"], "--batch_size"),
        (["--no_such_flag"], "--no_such_flag"),
        (["--num_epoch", "1"], "--num_epoch"),
        (["--val_split", "1"], "--val_split must leave"),
        (["--val_split", "nan"], "--val_split must be in"),
        (["--learning_rate", "nan"], "--learning_rate must be positive"),
        (["--learning_rate", "inf"], "--learning_rate must be"),
        (["--gradient_clip_val", "nan"], "--gradient_clip_val must be"),
        (["--mask_area_range", "0.3", "0.1"], "--mask_area_range"),
        (["--mask_area_range", "nan", "0.3"], "--mask_area_range"),
        (["--mask_types", "circle"], "error: --mask_types must be types of"),
        (["--mask_types", "irregular=-1"], "irregular"),
        (["--max_steps", "0"], "--max_steps must be positive"),
        (["--limit_train_batches", "1.5"], "--limit_train_batches"),
        (["--limit_train_batches", "0.1"], "at least one of the 5 batches"),
        (["--limit_train_batches", "few"], "--limit_train_batches"),
        (["--strategy", "deepspeed"], "needs CUDA"),
        (["--strategy", "fsdp"], "invalid choice"),
        (["--find_lr", "--strategy", "deepspeed"], "--find_lr"),
        (["--find_lr", "--resume_from_checkpoint", "last"], "--find_lr"),
        (["--devices", "two"], "--devices must be"),
        (["--devices", "0,1"], "--devices must be"),
        (["--early_stopping_patience", "3", "--val_split", "0"], "--early_stopping_patience"),
        (["--monitor", "val/loss", "--val_split", "0"], "--monitor val/loss needs pictures"),
        (["--monitor", "train/loss"], "--monitor"),
        (["--ema_decay", "1"], "--ema_decay must be between"),
        (["--seed", "-1"], "--seed must be"),
        (["--seed", "4294967296"], "--seed must be at most"),
        (["--output_dir", "README.md/runs"], "--output_dir must be a folder"),
        (["--num_nodes", "2"], "--num_nodes 2 needs a launcher"),
        (["--resume_from_checkpoint", "last"], "loadable checkpoint"),
        (["@missing.args"], "missing.args"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    wrong: list[str],
    message: str,
    flags: list[str],
    output_dir: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = train_lightning.main([*flags, "--output_dir", str(output_dir), *wrong])
    except SystemExit as end:  # argparse's own
        code = end.code
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(-1)
    errors = [line for line in capfd.readouterr().err.splitlines() if line]
    assert code == 2
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not output_dir.exists()


def test_while_starting_only_the_ending_signals_end_it() -> None:
    code = (
        "import signal, time, train_lightning as t; t._end_at_once_on_a_signal();"
        "signal.signal(signal.SIGALRM, lambda *_: print('somebody else answers', flush=True));"
        "signal.raise_signal(signal.SIGALRM); time.sleep(0.3); print('goes on', flush=True);"
        "signal.raise_signal(signal.SIGTERM); time.sleep(60)"
    )
    code, stdout, _ = run_typed(["-c", code])
    assert (code, stdout) == (143, "somebody else answers\ngoes on\n")


@pytest.mark.parametrize("wrong", [["--image_size", "500"], ["--no_such_flag"]], ids=" ".join)
def test_a_mistake_in_a_fresh_interpreter_says_nothing_else(
    wrong: list[str], flags: list[str], output_dir: Path
) -> None:
    command = ["train_lightning.py", *flags, "--output_dir", output_dir, *wrong]
    code, stdout, stderr = run_typed(command)
    assert code == 2
    assert (stdout + stderr).count("\n") == 1, stdout + stderr
    assert wrong[0] in stderr
    assert not output_dir.exists()


@pytest.mark.parametrize("base", ["inpainting", "sdxl"])
def test_an_unsuitable_base_is_refused_from_its_configuration(
    base: str, flags: list[str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny.base_folder(), tmp_path / "base"))
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    config = json.loads((folder / "unet" / "config.json").read_text())
    config |= {"in_channels": 9} if base == "inpainting" else {"addition_embed_type": "text_time"}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    command = [*flags, "--pretrained_model_name_or_path", folder]
    result = run(command, output_dir=tmp_path / "outputs")
    assert result.code == 2, result.output
    assert result.output.count("\n") == 1, result.output
    assert ("got 9" if base == "inpainting" else "SDXL") in result.output


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "without a file"])
def test_a_cached_base_needs_no_hub_and_no_other_line(
    is_whole: bool, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--some--base"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(tiny.base_folder(), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    if not is_whole:
        (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    # Asking would be refused at once, but diffusers would ask for half a minute.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0" if is_whole else "1")
    command = ["train_lightning.py", *flags, "--limit_train_batches", "1"]
    base = ["--pretrained_model_name_or_path", "some/base"]
    code, stdout, stderr = run_typed([*command, *base, "--output_dir", tmp_path / "outputs"])
    if is_whole:
        assert code == 0, stderr
        assert stdout.splitlines()[0].startswith("10 pictures train"), stdout
        assert "Hub" not in stderr
        assert "Warning" not in stderr
    else:
        assert (code, stdout) == (2, ""), stderr
        assert len(stderr.splitlines()) == 1, stderr
        assert "the base some/base must hold the weights" in stderr


def test_dry_run_loads_no_weights_and_leaves_no_folder(flags: list[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.base_folder(), tmp_path / "base"))
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    command = [*flags, "--pretrained_model_name_or_path", folder, "--dry_run"]
    result = run(command, output_dir=tmp_path / "outputs")
    assert result.code == 0, result.output
    assert re.search(r"image_size +64\n", result.output)
    assert "5 optimizer steps per epoch of 2 samples" in result.output
    num_parameters = sum(tensor.numel() for tensor in tiny.controlnet(tiny.base()).parameters())
    assert f"{num_parameters:,} trained parameters" in result.output
    assert not (tmp_path / "outputs").exists()


def test_arguments_may_stand_in_a_file(flags: list[str], tmp_path: Path) -> None:
    path = tmp_path / "my run.args"
    path.write_text("# a comment\n" + "\n".join(flags) + "\n--max_steps 1  # another\n")
    result = run([f"@{path}"], output_dir=tmp_path / "outputs")
    assert result.code == 0, result.output
    assert "done: 1 steps" in result.output


def test_find_lr_plots_into_the_run_folder_and_stops(flags: list[str], output_dir: Path) -> None:
    result = run([*flags, "--num_epochs", "30", "--find_lr"], output_dir=output_dir)
    assert result.code == 0, result.output
    names = {path.name for path in result.run_dir.rglob("*")}
    assert {"find_lr.png", "run.json", "run.log"} <= names
    assert not names & {"final_model", "checkpoints", "last.ckpt"}, names
    assert Image.open(result.run_dir / "find_lr.png").size > (100, 100)
    found = re.search(r"suggested: --learning_rate (\S+)", result.output)
    assert found is None or 1e-8 <= float(found[1]) <= 1
    assert "nan" not in result.output
    assert not list(Path.cwd().glob(".lr_find*"))


def test_the_simple_profiler_reports_into_the_run_folder(
    flags: list[str], output_dir: Path
) -> None:
    result = run([*flags, "--max_steps", "2", "--profiler", "simple"], output_dir=output_dir)
    assert result.code == 0, result.output
    [report] = result.run_dir.glob("*profile*.txt")
    assert "run_training_batch" in report.read_text()


def test_one_batch_is_learnt_by_heart(flags: list[str], output_dir: Path) -> None:
    result = run(
        [*flags, "--overfit_batches", "1", "--num_epochs", "60", "--learning_rate", "1e-2",
         "--log_every_n_steps", "10", "--log_images_every_n_steps", "20", "--val_split", "0"],
        output_dir=output_dir,
    )  # fmt: skip
    assert result.code == 0, result.output
    assert "done: 60 steps" in result.output
    loss = read_curve(result.run_dir, "train/loss")
    assert loss[60] < 0.97 * loss[10], loss


def test_limits_patience_and_no_split_end_a_run_as_asked(flags: list[str], tmp_path: Path) -> None:
    limited = run(
        [*flags, "--num_epochs", "2", "--limit_train_batches", "3", "--val_split", "0",
         "--lr_scheduler", "linear", "--log_every_n_steps", "1"],
        output_dir=tmp_path / "limited",
    )  # fmt: skip
    assert limited.code == 0, limited.output
    assert "done: 6 steps" in limited.output
    tags = read_events(limited.run_dir).Tags()["scalars"]
    assert not [tag for tag in tags if tag.startswith("val/")]
    run_json = json.loads((limited.run_dir / "run.json").read_text())
    assert run_json["arguments"]["monitor"] == "train_loss"
    rates = read_curve(limited.run_dir, "train/lr")
    assert rates[6] == pytest.approx(1e-3 / 6, rel=1e-5), "the schedule ends where the run does"

    # A rate that changes nothing: val/loss is never better than at first.
    patient = run(
        [*flags, "--num_epochs", "9", "--early_stopping_patience", "2", "--learning_rate", "1e-30"],
        output_dir=tmp_path / "patient",
    )
    assert patient.code == 0, patient.output
    assert "done: 15 steps" in patient.output
    epochs = [re.findall(r"epoch=(\d\d)", p.name) for p in patient.run_dir.glob("checkpoints/c*")]
    assert sorted(epochs) == [["00"], ["02"]]


def read_losses(flags: list[str], *, output_dir: Path) -> list[float]:
    result = run([*flags, "--max_steps", "4", "--log_every_n_steps", "1"], output_dir=output_dir)
    assert result.code == 0, result.output
    curve = read_curve(result.run_dir, "train/loss")
    assert sorted(curve) == [1, 2, 3, 4]
    assert all(map(math.isfinite, curve.values()))
    return list(curve.values())


def test_gradient_checkpointing_changes_no_loss(flags: list[str], tmp_path: Path) -> None:
    plain = read_losses(flags, output_dir=tmp_path / "plain")
    saving = read_losses([*flags, "--gradient_checkpointing"], output_dir=tmp_path / "saving")
    assert plain == saving


@pytest.mark.parametrize("form", ["controlnet.pth", "final_model", "ldm"])
def test_training_continues_from_weights_in_every_form(
    form: str, trained: Result, flags: list[str], tmp_path: Path
) -> None:
    folder = trained.run_dir / "final_model"
    weights = {"controlnet.pth": folder / "controlnet.pth", "final_model": folder}.get(form)
    if weights is None:
        code, stdout, stderr = run_typed(
            ["-m", "tools.export", trained.run_dir, "--format", "ldm", "--output_dir", tmp_path]
        )
        assert code == 0, stdout + stderr
        [weights] = tmp_path.glob("control_*.safetensors")
    # A rate of almost 0 leaves the weights where they started.
    result = run(
        [*flags, "--controlnet_weights", weights, "--learning_rate", "1e-30", "--max_steps", "1"],
        output_dir=tmp_path / "outputs",
    )
    assert result.code == 0, result.output
    start, end = read_weights(trained.run_dir), read_weights(result.run_dir)
    assert start.keys() == end.keys()
    assert all(torch.equal(start[name], end[name]) for name in start)


VARIANTS = {
    "bf16": ["--precision", "bf16-mixed"],
    "fp16 on CPU": ["--precision", "16-mixed"],
    "odd latents": ["--image_size", "72"],
    "Min-SNR and no prompts": ["--snr_gamma", "5", "--empty_prompt_prob", "1"],
    "outpainting": ["--mask_types", "outpaint", "--mask_area_range", "0.4", "0.5"],
    "workers": ["--num_workers", "2", "--deterministic"],
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_trains(variant: list[str], flags: list[str], output_dir: Path) -> None:
    read_losses([*flags, *variant], output_dir=output_dir)


@pytest.mark.parametrize(("prediction_type", "stride"), [("v_prediction", 8), ("epsilon", 4)])
def test_other_bases_train(
    prediction_type: str, stride: int, flags: list[str], output_dir: Path
) -> None:
    base = tiny.base_folder(prediction_type=prediction_type, stride=stride)
    read_losses([*flags, "--pretrained_model_name_or_path", str(base)], output_dir=output_dir)
    [run_dir] = output_dir.iterdir()
    record = json.loads((run_dir / "final_model" / "inpainting.json").read_text())
    assert (record["prediction_type"], record["vae_stride"]) == (prediction_type, stride)


def test_a_folder_of_pictures_is_enough(
    pictures: list[str], flags: list[str], output_dir: Path
) -> None:
    command = [*pictures[:2], *flags[len(pictures) :], "--max_steps", "1"]
    result = run(command, output_dir=output_dir)
    assert result.code == 0, result.output
    assert result.output.count("warning: no --ann_file: there are no object holes") == 1
