"""What can't work is refused before anything is loaded; what does nothing is warned about."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inpainting import preflight
from inpainting.base import read_base_config
from inpainting.flags import build_parser
from inpainting.preflight import check_flags, check_image_size, resolve_device
from tests import tiny

ROOT = Path(__file__).parents[2]


def parse(*arguments: str) -> argparse.Namespace:
    return build_parser().parse_args(arguments)


def refusal(*arguments: str) -> str:
    with pytest.raises((ValueError, OSError), match="got") as error:
        check_flags(parse(*arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_defaults_pass_without_a_warning() -> None:
    assert check_flags(parse()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch_size 0", "--batch_size must be at least 1, got 0."),
        ("--num_workers -1", "--num_workers must be at least 0, got -1."),
        ("--num_epochs 0", "--num_epochs must be at least 1, got 0."),
        ("--max_steps -2", "--max_steps must be at least -1, got -2."),
        ("--max_steps 0", "--max_steps must be positive, or -1 for no limit, got 0."),
        ("--accumulate_grad_batches 0", "--accumulate_grad_batches must be at least 1, got 0."),
        ("--save_every_n_epochs 0", "--save_every_n_epochs must be at least 1, got 0."),
        ("--save_every_n_steps 0", "--save_every_n_steps must be at least 1, got 0."),
        ("--save_top_k -2", "--save_top_k must be at least -1, got -2."),
        ("--log_every_n_steps 0", "--log_every_n_steps must be at least 1, got 0."),
        ("--log_images_every_n_steps -1", "--log_images_every_n_steps must be at least 0"),
        ("--lr_warmup_steps -1", "--lr_warmup_steps must be at least 0, got -1."),
        ("--num_nodes 0", "--num_nodes must be at least 1, got 0."),
        ("--overfit_batches -1", "--overfit_batches must be at least 0, got -1."),
        ("--seed -1", "--seed must be at least 0, got -1."),
        ("--seed 4294967296", "--seed must be at most 4294967295, got 4294967296."),
        ("--val_split 1.5", "--val_split must be in [0, 1], got 1.5."),
        ("--val_split nan", "--val_split must be in [0, 1], got nan."),
        ("--val_split 1", "--val_split must leave pictures to train on, got 1. Try 0.05."),
        ("--empty_prompt_prob -0.1", "--empty_prompt_prob must be in [0, 1], got -0.1."),
        ("--learning_rate 0", "--learning_rate must be positive, got 0.0. Try 1e-5."),
        ("--learning_rate nan", "--learning_rate must be positive, got nan."),
        ("--adam_weight_decay -1", "--adam_weight_decay must be at least 0, got -1.0."),
        ("--gradient_clip_val -1", "--gradient_clip_val must be at least 0, got -1.0."),
        ("--ema_decay 1", "--ema_decay must be between 0 and 1, got 1.0. Try 0.9999."),
        ("--ema_decay 0", "--ema_decay must be between 0 and 1, got 0.0. Try 0.9999."),
        ("--snr_gamma 0", "--snr_gamma must be positive, got 0.0. Try 5."),
        ("--early_stopping_patience 0", "--early_stopping_patience must be at least 1, got 0."),
        ("--limit_train_batches 0", "--limit_train_batches must be a number of batches (10) or"),
        ("--limit_train_batches -0.5", "or a share in (0, 1] (0.1), got -0.5."),
        ("--limit_train_batches 1.5", "or a share in (0, 1] (0.1), got 1.5."),
        ("--learning_rate inf", "--learning_rate must be positive"),
        ("--adam_weight_decay nan", "--adam_weight_decay must be at least 0, got nan"),
        ("--gradient_clip_val nan", "--gradient_clip_val must be at least 0, got nan"),
        ("--image_dir ./nothing", "--image_dir must be a folder that exists, got ./nothing."),
        ("--image_dir . --ann_file nothing", "--ann_file must exist, got nothing. Check the"),
        ("--image_dir . --caption_file nothing", "--caption_file must exist, got nothing."),
        ("--controlnet_weights nothing", "--controlnet_weights must exist, got nothing."),
        ("--ann_file FILE", "--ann_file needs --image_dir, got none. Name the pictures' folder."),
        ("--caption_file FILE", "--caption_file needs --image_dir, got none."),
        ("--output_dir FILE", "--output_dir must be a folder, got the file"),
        (
            "--find_lr --strategy deepspeed",
            "--find_lr must run without DeepSpeed, got --strategy deep",
        ),
        (
            "--use_8bit_adam --strategy deepspeed_stage_2",
            "--use_8bit_adam must run without DeepSpeed, got --strategy deepspeed_stage_2",
        ),
        ("--use_8bit_adam --strategy deepspeed", "it shards Adam's state instead. Drop one of the"),
        (
            "--find_lr --resume_from_checkpoint last",
            "--find_lr starts from fresh weights, got --resume_from_checkpoint too.",
        ),
        (
            "--ema_decay 0.9 --strategy deepspeed_stage_3",
            "--ema_decay needs whole parameters on each device, got --strategy deepspeed_stage_3.",
        ),
        (
            "--controlnet_weights FILE --resume_from_checkpoint last",
            "got both. Drop one of them.",
        ),
        (
            "--early_stopping_patience 3 --val_split 0",
            "--early_stopping_patience watches val/loss, got --val_split 0.",
        ),
        (
            "--monitor val/psnr_hole --val_split 0",
            "--monitor val/psnr_hole needs pictures that validate, got --val_split 0.",
        ),
        ("--monitor val/loss --val_split 0", "Set --val_split 0.05, or --monitor train_loss."),
        (
            "--strategy deepspeed --accelerator cpu",
            "--strategy deepspeed needs CUDA, got --accelerator cpu. Use --strategy ddp.",
        ),
        ("--mask_types object --image_dir .", "--mask_types object needs instance masks, got no"),
    ],
)
def test_what_cant_work_is_refused_in_one_line(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    assert message in refusal(*arguments.split())


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        ("--image_dir .", "no --ann_file: there are no object holes"),
        ("--lr_warmup_steps 100", "--lr_warmup_steps has no effect with --lr_scheduler constant"),
        (
            "--pretrained_model_name_or_path . --base_config x/y",
            "--base_config has no effect: the base is not a single file",
        ),
        ("--base_config x/y", "--base_config has no effect: the base is not a single file"),
        (
            "--monitor val/loss --save_top_k -1",
            "--monitor has no effect: --save_top_k -1 keeps all",
        ),
        ("--monitor val/loss --save_top_k 0", "--monitor has no effect: --save_top_k 0 keeps none"),
        (
            "--overfit_batches 2 --limit_train_batches 1",
            "--limit_train_batches limits what --overfit_batches already chose",
        ),
    ],
)
def test_a_flag_without_effect_is_warned_about_once(arguments, warning) -> None:
    lines = check_flags(parse(*arguments.split()))
    assert len(lines) == 1, lines
    assert lines[0].startswith(warning)


def test_adam_in_8_bits_needs_bitsandbytes(monkeypatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    assert refusal("--use_8bit_adam") == (
        "--use_8bit_adam needs bitsandbytes, got an installation without. Install it: "
        "pip install 'bitsandbytes>=0.50,<0.51', or drop the flag."
    )
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)
    assert check_flags(parse("--use_8bit_adam")) == []


def test_compiling_needs_a_compiler(monkeypatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    assert refusal("--compile", "regional") == (
        "--compile needs a C++ compiler (g++ or clang++, or the one that $CXX names), got none. "
        "Install one, or drop the flag."
    )
    monkeypatch.setattr(preflight.shutil, "which", lambda name: name if name == "icpx" else None)
    monkeypatch.setenv("CXX", "icpx")
    assert check_flags(parse("--compile", "regional")) == []


@pytest.mark.parametrize("variable", ["MASTER_ADDR", "SLURM_JOB_ID", "LSB_JOBID"])
def test_several_nodes_need_a_launcher(variable, monkeypatch) -> None:
    for name in ("MASTER_ADDR", "SLURM_JOB_ID", "LSB_JOBID"):
        monkeypatch.delenv(name, raising=False)
    assert "--num_nodes 2 needs a launcher on each machine" in refusal("--num_nodes", "2")
    monkeypatch.setenv(variable, "1")
    assert check_flags(parse("--num_nodes", "2")) == []


@pytest.mark.parametrize(
    "arguments",
    [
        "--strategy deepspeed_stage_2 --ema_decay 0.9",
        "--find_lr --strategy ddp",
        "--mask_types object",  # the demo's scenes have objects
        "--pretrained_model_name_or_path pyproject.toml --base_config x/y",
        "--val_split 0",
        "--early_stopping_patience 1",
        "--monitor val/control_gain",
        "--monitor train_loss --val_split 0",
        "--save_top_k -1 --max_steps 1 --limit_train_batches 0.5",
        "--lr_warmup_steps 10 --lr_scheduler cosine",
        "--gradient_clip_val 0 --adam_weight_decay 0",
    ],
)
def test_what_can_work_passes_without_a_warning(arguments, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert check_flags(parse(*arguments.split())) == []


@pytest.mark.parametrize(
    "flag",
    [
        "--strategy dp",
        "--precision 64",
        "--lr_scheduler step",
        "--monitor val/loss_t000_250",
        "--batch 4",
    ],
)
def test_unknown_choices_and_shortened_flags_are_refused(flag, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        parse(*flag.split())
    assert error.value.code == 2
    assert flag.split()[0] in capsys.readouterr().err


def test_arguments_may_stand_in_a_file(tmp_path) -> None:
    (tmp_path / "run.args").write_text('--batch_size 8  # eight\n\n--output_dir "my runs"\n')
    args = parse(f"@{tmp_path / 'run.args'}", "--seed", "7")
    assert (args.batch_size, args.output_dir, args.seed) == (8, "my runs", 7)


# ---- with the base's configuration


def test_a_missing_file_of_arguments_is_named_in_words(tmp_path, capsys) -> None:
    for path, reason in ((tmp_path / "no.args", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(SystemExit) as end:
            build_parser().parse_args([f"@{path}"])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert f"error: @ must be followed by a file of arguments, got {path} ({reason}" in error
        assert "Errno" not in error


@pytest.fixture(scope="module")
def config():
    return read_base_config(str(tiny.base_folder()))


@pytest.mark.parametrize(
    ("size", "advice"), [(500, "Try 448."), (4, "Try 64."), (0, "Try 64."), (-8, "Try 64.")]
)
def test_a_size_that_the_latents_cant_hold_is_refused(config, size, advice) -> None:
    with pytest.raises(
        ValueError, match=rf"--image_size must be a multiple of .*got {size}\."
    ) as e:
        check_image_size(size, config=config)
    assert str(e.value).endswith(advice)


@pytest.mark.parametrize("size", [64, 128, 512])
def test_whole_latents_are_accepted(config, size) -> None:
    check_image_size(size, config=config)


def test_the_multiple_follows_the_vaes_stride(config) -> None:
    coarse = replace(config, vae={**config.vae, "block_out_channels": [1] * 6})
    with pytest.raises(ValueError, match=r"must be a multiple of 32"):
        check_image_size(80, config=coarse)
    check_image_size(64, config=coarse)


# ---- with the machine


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have a GPU of some capability, or none."""

    def pretend(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return pretend


@pytest.mark.parametrize(
    ("capability", "arguments", "expected"),
    [
        (None, "", ("cpu", 1, "32")),
        (None, "--devices 2", ("cpu", 2, "32")),
        (None, "--precision bf16-mixed", ("cpu", 1, "bf16-mixed")),
        ((8, 0), "", ("gpu", -1, "bf16-mixed")),
        ((9, 0), "--accelerator gpu --devices 0,2", ("gpu", [0, 2], "bf16-mixed")),
        ((7, 5), "", ("gpu", -1, "16-mixed")),
        ((7, 5), "--accelerator cpu", ("cpu", 1, "32")),
        ((8, 6), "--precision 32 --devices 1", ("gpu", 1, "32")),
        ((8, 6), "--precision 32 --devices 3,", ("gpu", [3], "32")),
        ((8, 6), "--strategy deepspeed", ("gpu", -1, "bf16-mixed")),
    ],
)
def test_auto_takes_what_the_machine_has(machine, capability, arguments, expected) -> None:
    machine(capability)
    args = parse(*arguments.split())
    resolve_device(args)
    assert (args.accelerator, args.devices, args.precision) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--accelerator gpu", "--accelerator gpu needs CUDA, got a machine or a torch without"),
        ("--strategy deepspeed", "--strategy deepspeed needs CUDA, got a machine or a torch"),
        ("--strategy deepspeed_stage_3", "--strategy deepspeed_stage_3 needs CUDA"),
        ("--devices 0,1", "must be a number of processes on CPU, got 0,1. Try --devices 2."),
        ("--devices 0", "--devices must be a positive number, -1 for all, or a list like 0,2"),
        ("--devices=-2", "--devices must be a positive number"),
        ("--devices two", "must be a positive number, -1 for all, or a list like 0,2, got two."),
        ("--devices 1,x", "must be a positive number, -1 for all, or a list like 0,2, got 1,x."),
    ],
)
def test_what_the_machine_hasnt_got_is_refused(machine, arguments, message) -> None:
    machine(None)
    with pytest.raises(ValueError, match="got") as error:
        resolve_device(parse(*arguments.split()))
    assert message in str(error.value)


@pytest.mark.parametrize("capability", [None, (6, 0), (9, 0)])
def test_adam_in_8_bits_runs_on_a_cpu_and_on_most_gpus(machine, capability) -> None:
    machine(capability)
    resolve_device(parse("--use_8bit_adam"))


def test_adam_in_8_bits_is_refused_where_it_has_no_kernels(machine, monkeypatch) -> None:
    machine((5, 2))
    with pytest.raises(ValueError, match=r"a GPU of CUDA capability 6\.0, got 5\.2\. Drop"):
        resolve_device(parse("--use_8bit_adam"))
    machine(None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="needs CUDA or a CPU, got --accelerator mps"):
        resolve_device(parse("--use_8bit_adam"))


def test_fp16_on_a_cpu_becomes_bf16_and_is_said(machine, caplog) -> None:
    machine(None)
    args = parse("--precision", "16-mixed")
    with caplog.at_level(logging.WARNING):
        resolve_device(args)
    assert args.precision == "bf16-mixed"
    assert "fp16 doesn't exist on CPU" in caplog.text


def test_flags_are_checked_without_torch_or_lightning() -> None:
    code = (
        "import sys; from inpainting.flags import build_parser;"
        "from inpainting.preflight import check_flags;"
        "check_flags(build_parser().parse_args(['--seed', '1']));"
        "heavy = {'torch', 'pytorch_lightning', 'diffusers', 'transformers', 'pycocotools'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
