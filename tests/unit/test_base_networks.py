"""A base's files are read strictly: what doesn't fit is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import Sample
from inpainting.base_networks import BASE_PARTS
from model import Base, load_base
from tests import original_file, tiny

WEIGHT_FILES = {
    "vae": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def predict(base: Base, batch: Sample) -> torch.Tensor:
    hidden = base.encode_prompt(batch["input_ids"])
    return base.unet(batch["noise"], batch["timestep"], hidden, return_dict=False)[0]


def assert_same_networks(got: Base, expected: Base) -> None:
    for name in BASE_PARTS:
        tensors = getattr(expected, name).state_dict()
        loaded = getattr(got, name).state_dict()
        assert loaded.keys() == tensors.keys(), name
        different = [key for key in tensors if not torch.equal(loaded[key], tensors[key])]
        assert not different, f"{name}: {len(different)} tensors differ: {different[:3]}"


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value), str(error.value)
    return str(error.value)


# ---- a folder


@pytest.mark.parametrize("part", BASE_PARTS)
@pytest.mark.parametrize("fault", ["missing", "reshaped", "extra", "truncated", "absent"])
def test_a_folder_whose_weights_dont_fit_is_refused_in_one_line(folder, part, fault) -> None:
    path = folder / part / WEIGHT_FILES[part]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    if fault == "missing":
        del tensors[name]
    elif fault == "reshaped":
        tensors[name] = torch.zeros(3, 5)
    elif fault == "extra":
        name = "something_else"
        tensors[name] = torch.zeros(3)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif fault == "absent":
        path.unlink()
    else:
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the base my-base must hold the weights that") as error:
        load_base(str(folder))
    assert fault in ("truncated", "absent") or name in str(error.value)
    one_line(error)


def test_a_folder_with_nothing_but_the_fp16_form_is_read(folder) -> None:
    for part, name in WEIGHT_FILES.items():
        path = folder / part / name
        halves = {key: tensor.half() for key, tensor in load_file(path).items()}
        save_file(halves, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    expected = load_base(str(folder))
    rounded = {part: getattr(expected, part).half().float() for part in BASE_PARTS}
    for part, name in WEIGHT_FILES.items():
        (folder / part / name).unlink()
    assert_same_networks(load_base(str(folder)), replace(expected, **rounded))


def test_whole_pickles_go_before_the_fp16_form(folder) -> None:
    expected = load_base(str(folder))
    path = folder / "unet" / WEIGHT_FILES["unet"]
    tensors = load_file(path)
    path.unlink()
    torch.save(tensors, path.with_suffix(".bin"))
    halves = {key: tensor.half() for key, tensor in tensors.items()}
    save_file(halves, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
    assert_same_networks(load_base(str(folder)), expected)


def test_pickles_beside_safetensors_are_not_asked_for(folder) -> None:
    """Who clones a base's repository for its safetensors alone has pointers in their place."""
    expected = load_base(str(folder))
    for part, name in WEIGHT_FILES.items():
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        (folder / part / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert_same_networks(load_base(str(folder)), expected)


def test_a_safetensors_of_another_name_doesnt_let_a_pickle_through(folder) -> None:
    path = folder / "unet" / WEIGHT_FILES["unet"]
    path.rename(path.with_name("another.safetensors"))
    torch.save({}, path.with_suffix(".bin"))
    with pytest.raises(ValueError, match="the base my-base must hold the weights that"):
        load_base(str(folder))


def test_a_tokenizer_that_doesnt_belong_to_the_text_encoder_is_refused(folder) -> None:
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    vocabulary |= {f"word{i}</w>": 514 + i for i in range(3)}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match=r"must know the text encoder's 514 tokens, got 517"):
        load_base(str(folder))


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("fault", ["absent", "torn"])
def test_a_tokenizer_that_isnt_whole_is_refused_before_the_weights(folder, file, fault) -> None:
    (folder / "unet" / WEIGHT_FILES["unet"]).unlink()
    path = folder / "tokenizer" / file
    path.unlink() if fault == "absent" else path.write_bytes(b'{"a')
    with pytest.raises(ValueError, match=r"my-base must hold a CLIP tokenizer .*Fetch it") as error:
        load_base(str(folder))
    one_line(error)


# ---- a single file


def write_single(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "global_step": 7}, path)
    return str(path)


@pytest.mark.parametrize(
    ("suffix", "is_open_clip", "stride"),
    [(".safetensors", False, 8), (".ckpt", False, 4), (".safetensors", True, 8)],
)
def test_a_single_file_gives_the_folders_networks_bit_for_bit(
    tmp_path, suffix: str, is_open_clip: bool, stride: int
) -> None:
    expected = tiny.base(stride=stride)
    tensors = original_file.tensors(expected, is_open_clip=is_open_clip)
    path = write_single(tmp_path / f"sd{suffix}", tensors)
    got = load_base(path, base_config=str(tiny.base_folder(stride=stride)))
    assert_same_networks(got, expected)
    assert got.name == f"sd{suffix}"
    batch = tiny.batch(expected)
    with torch.no_grad():
        assert torch.equal(predict(got, batch), predict(expected, batch))
        image = torch.rand(1, 3, 64, 64)
        assert torch.equal(got.vae.encode(image)[0].mean, expected.vae.encode(image)[0].mean)


def test_a_half_precision_single_file_is_brought_to_the_wanted_dtypes(base, tmp_path) -> None:
    tensors = {name: tensor.half() for name, tensor in original_file.tensors(base).items()}
    path = write_single(tmp_path / "half.safetensors", tensors)
    got = load_base(path, base_config=str(tiny.base_folder()), dtype=torch.bfloat16)
    assert (got.unet.dtype, got.text_encoder.dtype) == (torch.bfloat16, torch.bfloat16)
    assert got.vae.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.diffusion_model.input_blocks.1.0.in_layers.2.weight", "unet"),
        ("model.diffusion_model.output_blocks.3.1.proj_in.bias", "unet"),
        ("model.diffusion_model.out.2.bias", "unet"),
        ("first_stage_model.encoder.mid.attn_1.q.weight", "vae"),
        ("first_stage_model.decoder.up.3.block.0.conv1.bias", "vae"),
        ("first_stage_model.quant_conv.weight", "vae"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text_encoder"),
    ],
)
@pytest.mark.parametrize("fault", ["missing", "reshaped", "renamed"])
def test_a_single_file_with_a_wrong_tensor_is_refused_in_one_line(
    base, tmp_path, name: str, part: str, fault: str
) -> None:
    tensors = original_file.tensors(base)
    tensor = tensors.pop(name)
    if fault == "reshaped":
        tensors[name] = torch.cat([tensor, tensor])
    elif fault == "renamed":
        tensors[name.replace(name.rpartition(".")[0], name.rpartition(".")[0] + "x")] = tensor
    path = write_single(tmp_path / "sd.safetensors", tensors)
    with pytest.raises(ValueError, match=r"the base sd\.safetensors must hold the weig") as error:
        load_base(path, base_config=str(tiny.base_folder()))
    kind = "of another shape" if fault == "reshaped" else "missing"
    assert f"got {part}: 1 {kind}" in one_line(error)


def test_a_single_file_with_half_a_convolution_is_refused_in_one_line(base, tmp_path) -> None:
    tensors = original_file.tensors(base)
    del tensors["model.diffusion_model.output_blocks.1.1.conv.bias"]
    path = write_single(tmp_path / "sd.safetensors", tensors)
    with pytest.raises(ValueError, match=r"got no tensor output_blocks\.1\.1\.conv\.bias\.") as e:
        load_base(path, base_config=str(tiny.base_folder()))
    one_line(e)


@pytest.mark.parametrize(
    ("prefix", "network"),
    [
        ("model.diffusion_model.", "UNet"),
        ("first_stage_model.", "VAE"),
        ("cond_stage_model.", "text encoder"),
    ],
)
def test_a_single_file_without_one_of_the_networks_is_refused(base, tmp_path, prefix, network):
    tensors = {n: t for n, t in original_file.tensors(base).items() if not n.startswith(prefix)}
    path = write_single(tmp_path / "sd.safetensors", tensors)
    with pytest.raises(ValueError, match=f"must hold a whole Stable Diffusion, got no {network}"):
        load_base(path, base_config=str(tiny.base_folder()))


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_ckpt_that_would_run_code_is_refused_and_runs_nothing(base, tmp_path) -> None:
    torch.save({"state_dict": {"x": Malice(tmp_path / "ran")}}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt must hold tensors only"):
        load_base(str(tmp_path / "evil.ckpt"), base_config=str(tiny.base_folder()))
    assert not (tmp_path / "ran").exists()
