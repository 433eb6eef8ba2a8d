from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file

from demo.random_base import write_random_base
from inpainting.checkpoints import find_record, write_final_model
from inpainting.interop import read_controlnet_weights
from tests.final_model import make_controlnet, make_record
from tools import export

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, *, stride: int = 8, base_name: str = "demo") -> ControlNetModel:
    base = write_random_base(folder / "base", stride=stride)
    controlnet = make_controlnet(base, stride=stride)
    for parameter in controlnet.parameters():  # zero-convolutions would hide a swap
        torch.nn.init.normal_(parameter)
    record = make_record(vae_stride=stride, base=base_name, base_unet_sha256=None, global_step=2)
    write_final_model(folder / "final_model", controlnet=controlnet, record=record, training={})
    return controlnet


@pytest.mark.parametrize("stride", [4, 8])
def test_diffusers_own_single_file_loader_reads_the_ldm_file_exactly(
    stride: int, tmp_path: Path
) -> None:
    controlnet = write_run(tmp_path, stride=stride)
    assert export.main([str(tmp_path), "--format", "ldm", "--dtype", "fp32"]) == 0
    path = tmp_path / "control_inpaint_demo.safetensors"
    assert all(name.startswith("control_model.") for name in load_file(path))
    read = ControlNetModel.from_single_file(str(path), config=str(tmp_path / "final_model"))
    for name, tensor in controlnet.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
        assert torch.equal(read_controlnet_weights(path)[name], tensor), name


def test_the_exported_file_keeps_the_record(tmp_path: Path) -> None:
    write_run(tmp_path)
    export.main([str(tmp_path), "--format", "ldm"])
    exported = find_record(tmp_path / "control_inpaint_demo.safetensors")
    assert exported == find_record(tmp_path / "final_model")
    assert exported is not None


def test_fp16_rounds_once(tmp_path: Path) -> None:
    controlnet = write_run(tmp_path)
    export.main([str(tmp_path / "final_model"), "--dtype", "fp16", "--output_dir", str(tmp_path)])
    read = read_controlnet_weights(tmp_path / "control_inpaint_demo.safetensors")
    for name, tensor in controlnet.state_dict().items():
        assert torch.equal(read[name], tensor.half()), name


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_diffusers_format_is_a_folder_that_from_pretrained_reads(
    dtype: str, tmp_path: Path
) -> None:
    controlnet = write_run(tmp_path)
    export.main([str(tmp_path), "--format", "diffusers", "--dtype", dtype])
    read = ControlNetModel.from_pretrained(
        str(tmp_path / "control_inpaint_demo"),
        torch_dtype={"fp32": torch.float32, "fp16": torch.float16}[dtype],
    )
    for name, tensor in controlnet.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor.to(read.dtype)), name


@pytest.mark.parametrize(
    ("width", "base", "expected"),
    [
        (768, "runwayml/anything", "sd15"),
        (1024, "x", "sd21"),
        (32, "a/b c", "a-b-c"),
        (32, "../..", "base"),
        (32, None, "base"),
    ],
)
def test_the_name_says_the_version_else_the_base(
    width: int, base: str | None, expected: str
) -> None:
    weights = {"down_blocks.0.x.attn2.to_k.weight": torch.zeros(8, width)}
    assert export._base_name(weights, base) == expected


def test_values_that_fp16_cant_hold_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "controlnet.pth"
    weights = {"controlnet_cond_embedding.conv_in.weight": torch.tensor([1.0, 7e4])}
    for value, flags, text in (
        (7e4, ["--dtype", "fp16"], "got 70000.0 in controlnet_cond"),
        (float("nan"), [], "must hold finite floating-point numbers, got NaN or infinite"),
        (float("-inf"), [], "must hold finite floating-point numbers, got NaN or infinite"),
    ):
        torch.save({name: tensor * 0 + value for name, tensor in weights.items()}, path)
        assert export.main([str(path), *flags]) == 2
        assert text in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["controlnet.pth"]


def test_a_lone_file_has_no_configuration_for_the_diffusers_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    controlnet = write_run(tmp_path)
    path = tmp_path / "elsewhere" / "controlnet.pth"
    path.parent.mkdir()
    torch.save(dict(controlnet.state_dict()), path)
    (tmp_path / "final_model").rename(tmp_path / "another")
    assert export.main([str(path), "--format", "diffusers"]) == 2
    assert "use --format ldm" in capsys.readouterr().err
    assert export.main([str(path), "--format", "ldm"]) == 0
    assert (path.parent / "control_inpaint_base.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required: RUN"),
        (["nowhere"], "RUN must be a run folder"),
        (["tools", "--format", "a1111"], "invalid choice: 'a1111'"),
        (["tools", "--output_dir", "pyproject.toml"], "--output_dir must be a folder"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2_before_torch_is_imported(
    arguments: list[str], text: str
) -> None:
    program = (
        "import sys, runpy, atexit\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "sys.argv = ['export', *sys.argv[1:]]\n"
        "runpy.run_module('tools.export', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stdout.strip() == "False"


def test_a_folder_without_weights_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
