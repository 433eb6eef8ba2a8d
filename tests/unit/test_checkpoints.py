"""The final_model folder: complete, exact, and found again."""

from __future__ import annotations

import json
import logging
import re
import stat
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from safetensors import safe_open
from safetensors.torch import save_file

from demo.random_base import write_random_base
from inpainting.checkpoints import base_hash, find_record, write_final_model
from tests.final_model import load_unet, make_controlnet, make_record

FILES = (
    "README.md",
    "config.json",
    "controlnet.pth",
    "diffusion_pytorch_model.safetensors",
    "inpainting.json",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_base(tmp_path_factory.mktemp("bases") / "my-base")


@pytest.fixture(scope="module")
def run_folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a final_model, for reading only."""
    folder = tmp_path_factory.mktemp("run")
    write_final_model(
        folder / "final_model",
        controlnet=make_controlnet(base),
        record=make_record(),
        training={"hole types": "irregular"},
    )
    return folder


def test_final_model_holds_its_files_readable_for_all_and_nothing_else(run_folder: Path) -> None:
    folder = run_folder / "final_model"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for name in FILES:
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o644, name


def test_final_model_is_read_by_diffusers_without_a_warning(
    run_folder: Path, base: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    folder = run_folder / "final_model"
    with caplog.at_level(logging.WARNING):
        read = ControlNetModel.from_pretrained(str(folder))
    assert not caplog.records, caplog.text
    written = make_controlnet(base).state_dict()
    assert read.state_dict().keys() == written.keys()
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, written[name]), name


def test_config_is_byte_for_byte_diffusers_own(
    run_folder: Path, base: Path, tmp_path: Path
) -> None:
    make_controlnet(base).save_pretrained(tmp_path)
    ours = (run_folder / "final_model" / "config.json").read_bytes()
    assert ours == (tmp_path / "config.json").read_bytes()


def test_no_file_names_where_the_weights_were(run_folder: Path, tmp_path: Path) -> None:
    continued = ControlNetModel.from_pretrained(str(run_folder / "final_model"))
    folder = write_final_model(
        tmp_path / "final_model", controlnet=continued, record=make_record(), training={}
    )
    for path in folder.iterdir():
        assert str(run_folder).encode() not in path.read_bytes(), path.name


def test_pth_is_a_plain_dict_of_fp32_tensors_equal_to_the_safetensors(run_folder: Path) -> None:
    folder = run_folder / "final_model"
    weights = torch.load(folder / "controlnet.pth", weights_only=True)
    assert type(weights) is dict
    with safe_open(folder / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.keys()) == weights.keys()
        for name, tensor in weights.items():
            assert type(tensor) is torch.Tensor
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, file.get_tensor(name)), name


def test_pieces_of_a_flat_buffer_are_written_without_the_rest_of_it(
    base: Path, tmp_path: Path
) -> None:
    controlnet = make_controlnet(base)
    shapes = {name: tensor.shape for name, tensor in controlnet.state_dict().items()}
    sizes = [shape.numel() for shape in shapes.values()]
    flat = torch.randn(3 * sum(sizes))  # as an optimizer's: parameters, then other things
    pieces = flat[: sum(sizes)].split(sizes)
    average = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
    write_final_model(
        tmp_path, controlnet=controlnet, record=make_record(), training={}, state_dict=average
    )
    read = torch.load(tmp_path / "controlnet.pth", weights_only=True)
    for name, tensor in average.items():
        assert torch.equal(read[name], tensor), name
    assert (tmp_path / "controlnet.pth").stat().st_size < flat.nbytes / 2


def test_the_same_weights_are_the_same_bytes(base: Path, tmp_path: Path) -> None:
    controlnet = make_controlnet(base)
    first, second = (
        write_final_model(tmp_path / name, controlnet=controlnet, record=make_record(), training={})
        for name in ("a", "b")
    )
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_half_precision_weights_are_written_in_fp32(base: Path, tmp_path: Path) -> None:
    controlnet = make_controlnet(base).bfloat16()
    write_final_model(tmp_path, controlnet=controlnet, record=make_record(), training={})
    read = torch.load(tmp_path / "controlnet.pth", weights_only=True)
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}


def test_record_is_found_from_every_place_of_a_run(run_folder: Path) -> None:
    record = make_record()
    (run_folder / "checkpoints").mkdir()
    (run_folder / "checkpoints" / "last.ckpt").touch()
    for place in ("", "final_model", "checkpoints", "checkpoints/last.ckpt"):
        assert find_record(run_folder / place) == record, place
    for name in FILES[2:]:
        assert find_record(run_folder / "final_model" / name) == record, name


def test_record_is_found_in_a_lone_safetensors_and_in_run_json(
    run_folder: Path, tmp_path: Path
) -> None:
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes(
        (run_folder / "final_model" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    assert find_record(lone) == make_record()
    save_file({"a": torch.zeros(1)}, lone)
    assert find_record(lone) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert find_record(tmp_path / "checkpoints" / "last.ckpt") is None
    fields = json.loads(make_record(global_step=7).to_json())
    (tmp_path / "run.json").write_text(json.dumps({"seed": 1, "inpainting": fields}))
    found = find_record(tmp_path / "checkpoints" / "last.ckpt")
    assert found == make_record(global_step=7)


def test_a_files_own_metadata_wins_over_its_neighbour(run_folder: Path, tmp_path: Path) -> None:
    source = run_folder / "final_model" / "diffusion_pytorch_model.safetensors"
    (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "inpainting.json").write_text(make_record(base="another").to_json())
    assert find_record(tmp_path / source.name) == make_record()


def test_a_damaged_record_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "inpainting.json").write_text("{}")
    with pytest.raises(ValueError, match=r"inpainting\.json: .*difference"):
        find_record(tmp_path / "controlnet.pth")


def test_base_hash_survives_a_cast_and_sees_another_base(base: Path) -> None:
    unet = load_unet(base)
    short = base_hash(unet)
    assert re.fullmatch("[0-9a-f]{16}", short)
    assert base_hash(unet.half()) == short
    assert base_hash(load_unet(base).bfloat16()) == short
    tuned = load_unet(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * parameter.std(correction=0) * torch.randn_like(parameter)
    assert base_hash(tuned) != short
