from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import cast

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from inpainting.interop import (
    describe_mismatch,
    find_weights,
    from_ldm,
    read_controlnet_weights,
    to_ldm,
)

REAL_CONFIGS = Path(__file__).parents[3] / "shared" / "weights"
HINTS = {1: (16,), 2: (16, 32), 4: (16, 32, 96), 8: (16, 32, 96, 256), 16: (16, 32, 96, 256, 256)}


def tiny_controlnet(*, num_blocks: int = 2, layers: int = 2, stride: int = 8) -> ControlNetModel:
    torch.manual_seed(0)
    attention = ["CrossAttnDownBlock2D"] * (num_blocks - 1)
    controlnet = ControlNetModel(
        down_block_types=(*attention, "DownBlock2D"),
        block_out_channels=(8, 16, 16, 16)[:num_blocks],
        layers_per_block=layers,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        conditioning_embedding_out_channels=HINTS[stride],
    )
    for parameter in controlnet.parameters():  # zero-convolutions would hide a swap
        torch.nn.init.normal_(parameter)
    return controlnet


def tiny_weights() -> dict[str, Tensor]:
    return dict(tiny_controlnet().state_dict())


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_ldm_names_and_back_give_the_same_tensors(
    num_blocks: int, layers: int, stride: int
) -> None:
    weights = dict(
        tiny_controlnet(num_blocks=num_blocks, layers=layers, stride=stride).state_dict()
    )
    ldm = to_ldm(weights)
    assert len(ldm) == len(weights)
    assert all(name.startswith("control_model.") for name in ldm)
    assert_same(from_ldm(ldm), weights)
    assert_same(from_ldm({k.removeprefix("control_model."): v for k, v in ldm.items()}), weights)


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("layers", [1, 2])
def test_diffusers_own_converter_gives_back_the_same_tensors(layers: int, stride: int) -> None:
    controlnet = tiny_controlnet(num_blocks=4, layers=layers, stride=stride)
    weights = dict(controlnet.state_dict())
    assert_same(convert_controlnet_checkpoint(to_ldm(weights), controlnet.config), weights)


@pytest.mark.parametrize("name", ["sd15_configs", "sd21base_configs"])
def test_all_340_tensors_of_the_real_shape_have_their_ldm_name(name: str) -> None:
    if not (REAL_CONFIGS / name).is_dir():
        pytest.skip("the configurations of the real base are not at hand")
    config = json.loads((REAL_CONFIGS / name / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = cast("UNet2DConditionModel", UNet2DConditionModel.from_config(config))
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    weights = dict(controlnet.state_dict())
    ldm = to_ldm(weights)
    theirs = convert_controlnet_checkpoint(dict(ldm), controlnet.config)
    assert len(weights) == len(ldm) == len(theirs) == 340
    for key, tensor in weights.items():
        assert theirs[key] is tensor, key
        assert from_ldm(ldm)[key] is tensor, key


def test_known_names_stand_where_the_first_controlnet_has_them() -> None:
    weights = dict(tiny_controlnet(num_blocks=4).state_dict())
    place = {id(tensor): name for name, tensor in to_ldm(weights).items()}
    for diffusers, ldm in {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down_blocks.1.resnets.1.time_emb_proj.bias": "input_blocks.5.0.emb_layers.1.bias",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight": (
            "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "mid_block.resnets.1.conv2.weight": "middle_block.2.out_layers.3.weight",
        "controlnet_down_blocks.11.weight": "zero_convs.11.0.weight",
        "controlnet_mid_block.bias": "middle_block_out.0.bias",
        "controlnet_cond_embedding.blocks.5.weight": "input_hint_block.12.weight",
        "controlnet_cond_embedding.conv_out.weight": "input_hint_block.14.weight",
    }.items():
        assert place[id(weights[diffusers])] == "control_model." + ldm


def test_a_tensor_without_a_place_is_named() -> None:
    with pytest.raises(ValueError, match=r"must have a place .* got 'difference'"):
        from_ldm(to_ldm(tiny_weights()) | {"difference": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"got 'up_blocks\.0\.x\.weight'"):
        to_ldm(tiny_weights() | {"up_blocks.0.x.weight": torch.zeros(1)})


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


FORMS = {
    "plain": lambda w: w,
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "model": lambda w: {"model": w},
    "controlnet": lambda w: {"controlnet": w, "step": 1000},
    "module prefix": lambda w: prefixed(w, "module."),
    "controlnet prefix": lambda w: {"state_dict": prefixed(w, "controlnet.")},
    "compiled": lambda w: prefixed(w, "module.controlnet._orig_mod."),
    "ldm": to_ldm,
    "ldm, bare": lambda w: {k.removeprefix("control_model."): v for k, v in to_ldm(w).items()},
    "whole Stable Diffusion": lambda w: {
        "state_dict": to_ldm(w) | {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    },
    "Lightning": lambda w: {
        "state_dict": prefixed(w, "controlnet."),
        "optimizer_states": [{"state": {}}],
        "pytorch-lightning_version": "2.6.6",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_pth_of_every_form_is_read(form: str, tmp_path: Path) -> None:
    weights = tiny_weights()
    torch.save(FORMS[form](weights), tmp_path / "weights.pth")
    assert_same(read_controlnet_weights(tmp_path / "weights.pth"), weights)


def test_files_are_read_by_content_whatever_their_name(tmp_path: Path) -> None:
    weights = tiny_weights()
    save_file(to_ldm(weights), tmp_path / "renamed.ckpt")
    torch.save(weights, tmp_path / "renamed.safetensors", _use_new_zipfile_serialization=False)
    assert_same(read_controlnet_weights(tmp_path / "renamed.ckpt"), weights)
    assert_same(read_controlnet_weights(tmp_path / "renamed.safetensors"), weights)


@pytest.mark.parametrize("is_nested", [False, True])
def test_the_average_is_preferred(is_nested: bool, tmp_path: Path) -> None:
    weights = tiny_weights()
    average = {name: tensor + 1 for name, tensor in weights.items()}
    content = {
        "state_dict": prefixed(weights, "controlnet."),
        "average": {"decay": 0.999, "controlnet": average} if is_nested else average,
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert_same(read_controlnet_weights(tmp_path / "last.ckpt"), average)


def test_half_precision_and_independence_from_the_file(tmp_path: Path) -> None:
    weights = {name: tensor.half() for name, tensor in tiny_weights().items()}
    torch.save(weights, tmp_path / "controlnet.pth")
    got = read_controlnet_weights(tmp_path / "controlnet.pth")
    (tmp_path / "controlnet.pth").write_bytes(b"")  # a mapped tensor would now end the process
    assert_same(got, weights)
    assert {tensor.dtype for tensor in got.values()} == {torch.float16}


@pytest.mark.parametrize("is_safetensors", [True, False])
def test_diffusers_folder_is_read(is_safetensors: bool, tmp_path: Path) -> None:
    controlnet = tiny_controlnet()
    controlnet.save_pretrained(tmp_path, safe_serialization=is_safetensors)
    assert_same(read_controlnet_weights(tmp_path), dict(controlnet.state_dict()))


def test_folders_stand_for_the_best_file_in_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must hold one of"):
        find_weights(tmp_path)
    for name in ("checkpoints/last.ckpt", "final_model/controlnet.pth", "controlnet.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        assert find_weights(tmp_path) == tmp_path / name
    with pytest.raises(FileNotFoundError, match=r"must exist, got .*nothing"):
        find_weights(tmp_path / "nothing")
    (tmp_path / "deepspeed.ckpt").mkdir()
    with pytest.raises(ValueError, match="sharded checkpoint"):
        find_weights(tmp_path / "deepspeed.ckpt")


class Payload:
    """Unpickled with weights_only=False, this creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("writer", ["torch", "torch legacy", "pickle"])
def test_a_pickle_with_a_payload_is_refused_and_not_run(writer: str, tmp_path: Path) -> None:
    target, path = tmp_path / "owned", tmp_path / "controlnet.pth"
    content = tiny_weights() | {"payload": Payload(target)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(ValueError, match="must hold tensors only") as caught:
        read_controlnet_weights(path)
    assert "\n" not in str(caught.value)
    assert "weights_only=False" not in str(caught.value)
    assert not target.exists()
    if writer == "torch":  # the payload is a real one
        torch.load(path, weights_only=False)
        assert target.exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "must hold tensors only"),
        (b"<!doctype html><html>404</html>", "must hold tensors only"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b'\x40\x00\x00\x00\x00\x00\x00\x00{"a":', "whole safetensors file"),
    ],
)
def test_foreign_files_are_refused_in_one_line(content: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        read_controlnet_weights(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_truncated_files_are_refused(keep: float, tmp_path: Path) -> None:
    torch.save(tiny_weights(), tmp_path / "a.pth")
    save_file(tiny_weights(), tmp_path / "a.safetensors")
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])
        with pytest.raises(ValueError, match=path.name):
            read_controlnet_weights(path)


def test_files_with_no_or_several_controlnets_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {"unet.conv_in.weight": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"got 1 tensors such as 'unet\.conv_in\.weight'"):
        read_controlnet_weights(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="got no tensors by name"):
        read_controlnet_weights(path)
    torch.save(prefixed(tiny_weights(), "nets.0.") | prefixed(tiny_weights(), "nets.1."), path)
    with pytest.raises(ValueError, match=r"one ControlNet, got 2 under 'nets\.0\.', 'nets\.1\.'"):
        read_controlnet_weights(path)


def test_describe_mismatch_counts_and_names() -> None:
    expected = {f"w{i}": torch.zeros(2, i) for i in range(6)}
    assert describe_mismatch(expected, dict(expected)) is None
    got = {"w5": torch.zeros(3), "new": torch.zeros(1)}
    assert describe_mismatch(expected, got) == (
        "5 missing: w0, w1, w2 and 2 more; 1 unexpected: new; "
        "1 of another shape: w5 (3,) instead of (2, 5)"
    )
