"""Weights, checkpoints and configurations from anywhere: nothing in them is run."""

from __future__ import annotations

import ast
import json
import os
import shutil
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from inpainting.base import FOREIGN_CODE_ENTRIES, LARGEST, read_base_config
from inpainting.checkpoints import find_record
from inpainting.interop import read_controlnet_weights, read_weight_file
from inpainting.runs import CHECKPOINT_PARTS, find_checkpoint, read_checkpoint
from model import load_base
from tests import tiny

ROOT = Path(__file__).parents[2]
# Written down once more, so that one that gets lost in the source is missed.
CODE_ENTRIES = (
    "auto_map", "custom_pipelines", "quantization_config", "attn_implementation",
    "_attn_implementation", "_attn_implementation_internal",
)  # fmt: skip
# The largest that a Stable Diffusion has.
USUAL_SIZES = {
    "sample_size": 128, "in_channels": 9, "out_channels": 8, "latent_channels": 4,
    "block_out_channels": 1280, "layers_per_block": 2, "cross_attention_dim": 1024,
    "attention_head_dim": 64, "num_attention_heads": 16, "norm_num_groups": 32,
    "transformer_layers_per_block": 1, "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "vocab_size": 49_408, "max_position_embeddings": 77,
    "projection_dim": 1024, "num_train_timesteps": 1000,
}  # fmt: skip
SOURCES = sorted(
    path
    for folder in (".", "inpainting", "demo", "tools", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
)


class Exploit:
    """A real one: unpickled without weights_only it runs a shell command."""

    def __init__(self, target: Path) -> None:
        self.command = f"touch '{target}'"

    def __reduce__(self) -> tuple:
        return (os.system, (self.command,))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """What appears when an exploit has run."""
    return tmp_path / "owned"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return dict(tiny.controlnet(tiny.base()).state_dict())


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.base_folder(), tmp_path / "base"))


def checkpoint(weights: dict[str, Tensor], **parts: Any) -> dict[str, Any]:
    """Return what this trainer's checkpoints hold, with other parts."""
    state_dict = {f"controlnet.{name}": tensor for name, tensor in weights.items()}
    return {**dict.fromkeys(CHECKPOINT_PARTS), "state_dict": state_dict, "global_step": 3, **parts}


def refusal(read: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(ValueError, match=r"\bgot\b") as caught:
        read(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert "weights_only=False" not in str(caught.value)
    return str(caught.value)


# Code in weights


def test_the_exploit_is_a_real_one(tmp_path: Path, target: Path) -> None:
    torch.save({"a": Exploit(target)}, tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert target.exists()


@pytest.mark.parametrize("name", ["controlnet.pth", "last.ckpt", "pytorch_model.bin", "a.pt"])
def test_code_in_controlnet_weights_is_refused_and_not_run(
    tmp_path: Path, target: Path, weights: dict[str, Tensor], name: str
) -> None:
    torch.save({**weights, "exploit": Exploit(target)}, tmp_path / name)
    assert "must hold tensors only" in refusal(read_controlnet_weights, tmp_path / name)
    assert not target.exists()


def test_code_in_a_diffusers_folders_bin_is_refused_and_not_run(
    tmp_path: Path, target: Path, weights: dict[str, Tensor]
) -> None:
    folder = tmp_path / "controlnet"
    folder.mkdir()
    torch.save({**weights, "x": Exploit(target)}, folder / "diffusion_pytorch_model.bin")
    assert "must hold tensors only" in refusal(read_controlnet_weights, folder)
    assert not target.exists()


@pytest.mark.parametrize("part", ["average", "optimizer_states", "callbacks", "state_dict", "x"])
def test_code_in_any_part_of_a_checkpoint_is_refused_and_not_run(
    tmp_path: Path, target: Path, weights: dict[str, Tensor], part: str
) -> None:
    path = tmp_path / "controlnet_inpainting_lightning_1" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(checkpoint(weights, **{part: {"exploit": Exploit(target)}}), path)
    assert "must be a training checkpoint" in refusal(read_checkpoint, path)
    with pytest.raises(FileNotFoundError, match="needs a run with a loadable checkpoint"):
        find_checkpoint("last", output_dir=tmp_path)
    assert "must hold tensors only" in refusal(read_controlnet_weights, path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "pytorch_model"),
    ],
)
def test_code_in_a_bases_bin_is_refused_and_not_run(
    base_folder: Path, target: Path, part: str, name: str
) -> None:
    for path in (base_folder / part).glob("*.safetensors"):
        path.unlink()
    torch.save({"conv_in.weight": Exploit(target)}, base_folder / part / f"{name}.bin")
    assert "the base base must hold the weights" in refusal(load_base, str(base_folder))
    assert not target.exists()


def test_code_in_a_single_file_base_is_refused_and_not_run(
    base_folder: Path, tmp_path: Path, target: Path
) -> None:
    path = tmp_path / "sd.ckpt"
    torch.save({"state_dict": {"x": torch.zeros(1)}, "callbacks": Exploit(target)}, path)
    line = refusal(load_base, str(path), base_config=str(base_folder))
    assert "must hold tensors only" in line
    assert not target.exists()


def test_no_environment_variable_gives_files_the_power_back(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"exploit": Exploit(target)}, tmp_path / "a.pth")
    refusal(read_controlnet_weights, tmp_path / "a.pth")
    refusal(read_checkpoint, tmp_path / "a.pth")
    assert not target.exists()


# Code in configurations


def change(folder: Path, file: str, **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_configuration_with_a_foreign_class_name_is_refused(base_folder: Path, part: str) -> None:
    key = "architectures" if part == "text_encoder" else "_class_name"
    value = ["os.system"] if part == "text_encoder" else "os.system"
    change(base_folder, f"{part}/config.json", **{key: value})
    assert f"got os.system in {part}" in refusal(read_base_config, str(base_folder))


@pytest.mark.parametrize("name", sorted({*CODE_ENTRIES, *FOREIGN_CODE_ENTRIES}))
@pytest.mark.parametrize(
    "file",
    ["unet/config.json", "vae/config.json", "text_encoder/config.json",
     "scheduler/scheduler_config.json"],
)  # fmt: skip
def test_a_configuration_that_would_fetch_code_is_refused(
    base_folder: Path, file: str, name: str
) -> None:
    change(base_folder, file, **{name: {"AutoModel": "evil--evil.Model"}})
    assert f"got {name}, by which other code" in refusal(read_base_config, str(base_folder))


def test_foreign_blocks_are_refused(base_folder: Path) -> None:
    blocks = json.loads((base_folder / "unet" / "config.json").read_text())["down_block_types"]
    change(base_folder, "unet/config.json", down_block_types=["os.system"] * len(blocks))
    assert "os.system" in refusal(load_base, str(base_folder))


def test_a_tokenizers_code_is_not_run(base_folder: Path, target: Path) -> None:
    folder = base_folder / "tokenizer"
    (folder / "evil.py").write_text(f"open({str(target)!r}, 'w')\nclass Evil: pass\n")
    change(
        base_folder, "tokenizer/tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_base(str(base_folder))
        except ValueError as error:
            assert "tokenizer" in str(error)  # noqa: PT017 - that it loads is fine too
    assert not target.exists()


# Files that claim more than they are


def forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> None:
        raise AssertionError("the file was unpacked")

    monkeypatch.setattr(torch, "load", load)


def write_zip_bomb(path: Path, *, num_mib: int = 32) -> None:
    """Write a checkpoint whose tensors are zeros, compressed a thousand times."""
    torch.save(checkpoint({"x": torch.zeros(num_mib * 2**18)}), path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert path.stat().st_size < num_mib * 2**20 / 100


def test_a_zip_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    write_zip_bomb(path)
    forbid_loading(monkeypatch)
    assert "bytes that unpack to 33," in refusal(read_weight_file, path)
    assert "must be a training checkpoint" in refusal(read_checkpoint, path)


def test_a_zip_bomb_in_a_base_is_refused_before_it_is_unpacked(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (base_folder / "unet").glob("*.safetensors"):
        path.unlink()
    write_zip_bomb(base_folder / "unet" / "diffusion_pytorch_model.bin")
    forbid_loading(monkeypatch)
    assert "bytes that unpack to 33," in refusal(load_base, str(base_folder))


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(3)}, path)
    content = bytearray(path.read_bytes())
    start = content.rindex(b"PK\x01\x02")  # an entry of the list of contents
    content[start : start + 4] = b"PKxx"
    path.write_bytes(content)
    assert "must be a whole weight file" in refusal(read_weight_file, path)


def test_a_shape_that_the_file_has_no_room_for_is_refused(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    for shape in ((2**44,), (2**22, 2**22)):
        giant = {**weights, "conv_in.weight": torch.zeros(1).expand(shape)}
        torch.save(giant, tmp_path / "a.pth")
        assert (tmp_path / "a.pth").stat().st_size < 2**24
        line = refusal(read_controlnet_weights, tmp_path / "a.pth")
        assert "no room for in conv_in.weight" in line


def test_many_shapes_that_the_file_has_no_room_for_are_refused(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    each = torch.zeros(1).expand(2**20)
    torch.save({**weights, **{f"x{i}": each for i in range(2000)}}, tmp_path / "a.pth")
    assert "no room for in x" in refusal(read_controlnet_weights, tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("length", "content"),
    [
        (2**40, b"{}"),
        (2**63, b'{"a":1}'),
        (150_000_000, b"{" + b" " * 1000),
        (40, b'{"a":{"dtype":"F32","shape":[' + b"9" * 11),
    ],
)
def test_a_safetensors_header_that_claims_too_much_is_refused(
    tmp_path: Path, length: int, content: bytes
) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + content)
        file.truncate(200_000_000 if length == 150_000_000 else 100)  # sparse: no disk is used
    assert "must be a whole safetensors file" in refusal(read_weight_file, path)
    assert "must be a whole safetensors file" in refusal(find_record, path)


@pytest.mark.parametrize("shape", [[2**40], [2**40, 2**40], [-1], [1, 2**63]])
def test_a_safetensors_shape_that_its_data_lack_is_refused(
    tmp_path: Path, shape: list[int]
) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert "must be a whole safetensors file" in refusal(read_weight_file, path)


@pytest.mark.parametrize("name", sorted({*USUAL_SIZES, *LARGEST}))
@pytest.mark.parametrize(
    "make",
    [
        lambda usual: 200 * usual, lambda _: 0, lambda _: -1, lambda _: 1.5, lambda _: "9",
        lambda _: True, lambda usual: [200 * usual], lambda _: [], lambda _: [4] * 1000,
    ],
)  # fmt: skip
def test_a_configuration_that_claims_an_absurd_size_is_refused(
    base_folder: Path, name: str, make: Any
) -> None:
    value = make(USUAL_SIZES[name])
    part = "vae" if name == "latent_channels" else "text_encoder"
    change(base_folder, f"{part}/config.json", **{name: value})
    assert f"{name} in the {part}'s configuration" in refusal(read_base_config, str(base_folder))


# Values that no training can start from


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda t: torch.full_like(t, float("nan")), "NaN or infinite values"),
        (lambda t: t.index_fill(0, torch.tensor([0]), float("inf")), "NaN or infinite values"),
        (lambda t: t.to(torch.int8), "int8"),
        (lambda t: t.to(torch.int64), "int64"),
        (lambda t: t.bool(), "bool"),
        (lambda t: t.to(torch.complex64), "complex64"),
        (lambda t: t.to_sparse(), "another kind of tensor"),
        (lambda t: t.to("meta"), "another kind of tensor"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused(
    tmp_path: Path, weights: dict[str, Tensor], make: Any, got: str
) -> None:
    bad = {**weights, "conv_in.weight": make(weights["conv_in.weight"])}
    torch.save(bad, tmp_path / "a.pth")
    line = refusal(read_controlnet_weights, tmp_path / "a.pth")
    assert f"got {got} in conv_in.weight" in line


def test_integer_and_nan_weights_in_a_safetensors_file_are_refused(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(
        {**weights, "conv_in.bias": torch.full_like(weights["conv_in.bias"], torch.nan)}, path
    )
    assert "got NaN or infinite values in conv_in.bias" in refusal(
        read_controlnet_weights, tmp_path
    )
    save_file({**weights, "conv_in.bias": weights["conv_in.bias"].to(torch.int32)}, path)
    assert "got int32 in conv_in.bias" in refusal(read_controlnet_weights, tmp_path)


def test_tensors_outside_the_controlnet_are_not_looked_at(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    content = checkpoint(weights, epoch=torch.tensor(3))
    content["state_dict"]["base.scale"] = torch.tensor(float("nan"))
    torch.save(content, tmp_path / "last.ckpt")
    assert read_controlnet_weights(tmp_path / "last.ckpt").keys() == weights.keys()


# The sources


def calls(source: str) -> list[tuple[str, ast.Call]]:
    """Return each call with its function's full name, by whichever one it was imported."""
    nodes = list(ast.walk(ast.parse(source)))
    full: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            full |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            full |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = []
    for node in nodes:
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            found.append((full.get(first, first) + dot + rest, node))
    return found


def keywords(call: ast.Call) -> dict[str, str]:
    return {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg}


def unsafe(source: ast.Call, name: str) -> str | None:
    """Say what makes a call unsafe, None where nothing does."""
    words = keywords(source)
    if name in ("eval", "exec", "os.system", "__import__") or name.startswith(
        ("pickle.", "marshal.", "dill.", "joblib.")
    ):
        return "runs code"
    if name.startswith("yaml.") and name != "yaml.safe_load":
        return "yaml makes objects"
    if name == "torch.load" and words.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and words.get("allow_pickle", "False") != "False":
        return "np.load with allow_pickle"
    if "trust_remote_code" in words or words.get("shell") == "True":
        return "remote code or a shell"
    if words.get("weights_only", "True") != "True":
        return "weights_only isn't True"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_reads_a_file_with_the_power_to_run_code(path: Path) -> None:
    found = {
        f"line {call.lineno}: {why}"
        for name, call in calls(path.read_text(encoding="utf-8"))
        if (why := unsafe(call, name))
    }
    assert not found, f"{path.name}: {sorted(found)}"


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)", "pickle.load(file)", "yaml.load(file)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)",
        "Model.from_pretrained(name, trust_remote_code=True)", "run(command, shell=True)",
        "trainer.fit(module, weights_only=False)", "from pickle import loads; loads(data)",
        "import yaml as y; y.load(file)", "from torch import load; load(path)",
    ],
)  # fmt: skip
def test_an_unsafe_line_would_be_found(line: str) -> None:
    [(name, call)] = calls(line)
    assert unsafe(call, name)
