"""ControlNet weights in every form that people have, brought to diffusers' names and back.

Two vocabularies name the same tensors: *diffusers* (down_blocks, mid_block, controlnet_*), which
this project trains and saves, and *LDM* (input_blocks, middle_block, zero_convs, under the prefix
`control_model.`), which ComfyUI and A1111 know from the first ControlNet. Both follow from one
table of modules, `module_table`. Nothing here runs code from a weight file.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

LDM_PREFIX = "control_model."
# Every ControlNet has these keys and nothing else does: what stands before them is a prefix.
DIFFUSERS_ANCHOR = "controlnet_cond_embedding.conv_in.weight"
LDM_ANCHOR = "input_hint_block.0.weight"
# Where trainers put the weights inside a checkpoint; the average is better than what it averages.
WRAPPERS = ("average", "state_dict", "controlnet", "model", "module")
# What a folder may hold, best first: final_model/, an older trainer's checkpoint-1000/, a run.
FOLDER_FILES = (
    "diffusion_pytorch_model.safetensors",
    "controlnet.pth",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "final_model/diffusion_pytorch_model.safetensors",
    "final_model/controlnet.pth",
    "controlnet/diffusion_pytorch_model.safetensors",
    "checkpoints/last.ckpt",
)
NUM_SHOWN = 3  # names in a message
HINT_OUT_INDEX = 14  # of input_hint_block: the first ControlNet's; diffusers expects it there

# diffusers -> LDM; source: lllyasviel/ControlNet, cldm/cldm.py and ldm's openaimodel.py.
FIXED_MODULES = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
}
RESNET_MODULES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@dataclass(frozen=True)
class Layout:
    """The counts that decide where each module stands; SD 1.x and 2.x are Layout(4, 2, 6, 14).

    Attributes:
        num_down_blocks: resolutions of the encoder.
        layers_per_block: residual layers at each resolution.
        num_hint_blocks: convolutions between the hint encoder's first and last one.
        hint_out_index: index of the hint encoder's last convolution in LDM's input_hint_block.
    """

    num_down_blocks: int
    layers_per_block: int
    num_hint_blocks: int
    hint_out_index: int


def module_table(layout: Layout) -> dict[str, str]:
    """Return the LDM name of every module, by its diffusers name, without prefix.

    The names are those of the modules at which the two vocabularies part; what stands below them
    (transformer_blocks.0.attn1.to_q.weight) is the same in both.
    """
    table = dict(FIXED_MODULES)
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    stage = layout.layers_per_block + 1  # input blocks per resolution: its layers, a downsampler
    for i in range(layout.num_down_blocks):
        for j in range(layout.layers_per_block):
            index = stage * i + j + 1
            resnets[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{index}.0"
            table[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{index}.1"
        table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{stage * (i + 1)}.0.op"
    for resnet, ldm_resnet in resnets.items():
        for inner, ldm_inner in RESNET_MODULES.items():
            table[f"{resnet}.{inner}"] = f"{ldm_resnet}.{ldm_inner}"
    for n in range(stage * layout.num_down_blocks):
        table[f"controlnet_down_blocks.{n}"] = f"zero_convs.{n}.0"
    for k in range(layout.num_hint_blocks):
        table[f"controlnet_cond_embedding.blocks.{k}"] = f"input_hint_block.{2 * k + 2}"
    table["controlnet_cond_embedding.conv_out"] = f"input_hint_block.{layout.hint_out_index}"
    return table


def to_ldm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename diffusers' tensors for ComfyUI and A1111, prefix `control_model.` included.

    The tensors are the same objects; `from_ldm` is the exact inverse.

    Raises:
        ValueError: a tensor has no place in an SD 1.x or 2.x ControlNet.
    """
    num_hint_blocks = 1 + _largest(r"controlnet_cond_embedding\.blocks\.(\d+)\.", state_dict)
    layout = Layout(
        num_down_blocks=1 + _largest(r"down_blocks\.(\d+)\.", state_dict),
        layers_per_block=1 + _largest(r"down_blocks\.\d+\.resnets\.(\d+)\.", state_dict),
        num_hint_blocks=num_hint_blocks,
        # The place of the original also where a smaller stride leaves a gap before it: diffusers'
        # loader looks nowhere else. Only a stride above 8 has no room left.
        hint_out_index=max(HINT_OUT_INDEX, 2 * num_hint_blocks + 2),
    )
    table = module_table(layout)
    return {LDM_PREFIX + _rename(name, table): tensor for name, tensor in state_dict.items()}


def from_ldm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename LDM's tensors, with or without the prefix `control_model.`, to diffusers' names.

    The layout is read off the names: a resolution ends where a downsampler (`.0.op`) stands.

    Raises:
        ValueError: a tensor has no place in an SD 1.x or 2.x ControlNet.
    """
    names = {name: name.removeprefix(LDM_PREFIX) for name in state_dict}
    bare = names.values()
    num_input_blocks = 1 + _largest(r"input_blocks\.(\d+)\.", bare)
    downsamplers = _indices(r"input_blocks\.(\d+)\.0\.op\.", bare)
    hints = _indices(r"input_hint_block\.(\d+)\.", bare)
    layout = Layout(
        num_down_blocks=len(downsamplers) + 1,
        layers_per_block=min(downsamplers, default=num_input_blocks) - 1,
        num_hint_blocks=max(len(hints) - 2, 0),
        hint_out_index=max(hints, default=HINT_OUT_INDEX),
    )
    table = {ldm: diffusers for diffusers, ldm in module_table(layout).items()}
    return {_rename(names[name], table): tensor for name, tensor in state_dict.items()}


def _indices(pattern: str, names: Iterable[str]) -> set[int]:
    """Return the numbers that the pattern's group takes at the beginning of the names."""
    matches = (re.match(pattern, name) for name in names)
    return {int(match[1]) for match in matches if match}


def _largest(pattern: str, names: Iterable[str]) -> int:
    return max(_indices(pattern, names), default=-1)


def _rename(name: str, table: Mapping[str, str]) -> str:
    """Replace the longest module name in the table that begins this tensor's name."""
    module = name
    while "." in module:
        module = module.rpartition(".")[0]
        if module in table:
            return table[module] + name[len(module) :]
    raise ValueError(
        f"every tensor must have a place in an SD 1.x or 2.x ControlNet, got {name!r}. "
        "Name the weights of a plain ControlNet."
    )


def find_weights(path: str | Path) -> Path:
    """Return the weight file that a path stands for: itself, or the best one in a folder.

    Raises:
        FileNotFoundError: there is no such path, or the folder holds no weights.
        ValueError: the folder is a DeepSpeed checkpoint.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"the ControlNet's weights must exist, got {path}. Check the path.")
    for name in FOLDER_FILES:
        if (path / name).is_file():
            return path / name
    if path.suffix == ".ckpt" or (path / "checkpoints" / "last.ckpt").is_dir():
        raise ValueError(
            f"the weights must be in one file, got the sharded checkpoint {path}. "
            "Name the run's final_model folder; resume the run to its end if there is none."
        )
    raise FileNotFoundError(
        f"a folder of ControlNet weights must hold one of {', '.join(FOLDER_FILES[:3])} or a "
        f"final_model folder, got {path}. Name the file itself."
    )


def read_controlnet_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a ControlNet from whatever people have, without running code from the file.

    Understood: a controlnet.pth (also nested or prefixed by its trainer), a diffusers folder, a
    run folder, a .safetensors/.pth/.ckpt with LDM's names (also inside a whole Stable Diffusion),
    and this trainer's .ckpt, from which the average is taken when there is one.

    Returns:
        Tensors by diffusers' names, on CPU, in the file's own dtype, independent of the file.

    Raises:
        FileNotFoundError: there are no weights at the path.
        ValueError: the file isn't a weight file, may run code, or holds no ControlNet, or one
            whose tensors are no finite floating-point numbers.
    """
    path = find_weights(path)
    state_dict, prefix, is_ldm = _find_controlnet(read_weight_file(path), path)
    own, room = {}, path.stat().st_size
    for name, tensor in state_dict.items():
        if name.startswith(prefix):
            room -= tensor.numel() * tensor.element_size()
            _check_tensor(tensor, name=name, path=path, has_room=room >= 0)
            own[name.removeprefix(prefix)] = tensor.detach().clone().contiguous()
    try:
        return from_ldm(own) if is_ldm else own
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_tensor(tensor: Tensor, *, name: str, path: Path, has_room: bool) -> None:
    """Refuse a tensor that can't be a trained weight, before it is copied.

    Args:
        tensor: as the file has it.
        name: its name there.
        path: of the file.
        has_room: whether the file is large enough for it: a stride of 0 claims any shape.

    Raises:
        ValueError: names it.
    """
    got = None
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        got = "another kind of tensor"
    elif not tensor.is_floating_point():
        got = str(tensor.dtype).removeprefix("torch.")
    elif not has_room:
        got = f"a shape {tuple(tensor.shape)} that the file has no room for"
    elif not tensor.isfinite().all():
        got = "NaN or infinite values"
    if got is not None:
        raise ValueError(
            f"{path} must hold finite floating-point numbers, got {got} in {name}. "
            "Name weights of an earlier step, or fetch the file again."
        )


def check_archive(path: Path) -> None:
    """Refuse a zip file that would unpack to more than it is: torch.save never compresses.

    Raises:
        ValueError: it is such a file, or its list of contents is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} must be a whole weight file, got: {error}.") from error
    if unpacked > path.stat().st_size:
        raise ValueError(
            f"{path} must hold its tensors uncompressed, as torch.save writes them, got "
            f"{path.stat().st_size:,} bytes that unpack to {unpacked:,}. Fetch it again."
        )


def read_weight_file(path: Path) -> object:
    """Return what a weight file holds: by its content, since people rename files.

    Raises:
        ValueError: it holds more than tensors, or is cut short or foreign.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} must be a weight file, got a Git LFS pointer. Run `git lfs pull` there."
        )
    is_safetensors = head[8:9] == b"{"  # the header's length in 8 bytes, then JSON
    is_archive = not is_safetensors and zipfile.is_zipfile(path)
    if is_archive:
        check_archive(path)
    try:
        if is_safetensors:
            return load_file(path)
        # Mapped, so that a checkpoint's optimizer state is never read. By a handle where torch
        # would trust the name more than the content.
        if is_archive and path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, got: {_first_line(error)} Fetch it again."
        ) from error
    except Exception as error:  # a foreign file makes the unpickler fail in any way
        raise ValueError(
            f"{path} must hold tensors only (weights_only=True), got: {_first_line(error)} "
            "If you trust it, save its state_dict() again with safetensors."
        ) from error


def _first_line(error: Exception) -> str:
    """Return a message's one useful sentence; torch's go on about how to switch safety off."""
    text = str(error).strip() or type(error).__name__
    reason = re.search(r"Unsupported (?:global|class|operand)[^.\n]*(?:\.\w+)*", text)
    return (reason[0] if reason else text.splitlines()[0].split(". ")[0]).rstrip(".") + "."


def _find_controlnet(content: object, path: Path) -> tuple[dict[str, Tensor], str, bool]:
    """Find the tensors of the one ControlNet in a file.

    Returns:
        The mapping that holds it, the prefix of its names there, and whether they are LDM's.

    Raises:
        ValueError: there is none, or more than one.
    """
    names: list[str] = []
    candidates: list[object] = [content]
    seen: set[int] = set()
    while candidates:
        candidate = candidates.pop(0)
        if not isinstance(candidate, Mapping) or id(candidate) in seen:
            continue
        seen.add(id(candidate))  # a crafted file can hold itself
        tensors = {
            name: value
            for name, value in candidate.items()
            if isinstance(name, str) and isinstance(value, Tensor)
        }
        names += tensors
        for anchor, is_ldm in ((DIFFUSERS_ANCHOR, False), (LDM_ANCHOR, True)):
            prefixes = [
                name.removesuffix(anchor)
                for name in tensors
                if name == anchor or name.endswith("." + anchor)
            ]
            if len(prefixes) > 1:
                raise ValueError(
                    f"{path} must hold one ControlNet, got {len(prefixes)} under "
                    f"{', '.join(map(repr, prefixes))}. Save the wanted one alone."
                )
            if prefixes:
                return tensors, prefixes[0], is_ldm
        nested = [candidate[wrapper] for wrapper in WRAPPERS if wrapper in candidate]
        candidates = nested + candidates
    held = f"{len(names)} tensors such as {names[0]!r}" if names else "no tensors by name"
    raise ValueError(
        f"{path} must hold a ControlNet ({DIFFUSERS_ANCHOR} or {LDM_PREFIX}{LDM_ANCHOR}), "
        f"got {held}. Name a file that a ControlNet trainer wrote."
    )


def describe_mismatch(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str | None:
    """Say in one line how two sets of tensors differ by name and shape; None if they don't.

    Args:
        expected: as the model has them.
        got: as the file has them.

    Returns:
        the counts, and NUM_SHOWN names of each kind.
    """
    missing = [name for name in expected if name not in got]
    unexpected = [name for name in got if name not in expected]
    reshaped = [
        f"{name} {tuple(got[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in got and got[name].shape != expected[name].shape
    ]
    parts = []
    for kind, items in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", reshaped),
    ):
        if items:
            rest = f" and {len(items) - NUM_SHOWN} more" if len(items) > NUM_SHOWN else ""
            parts.append(f"{len(items)} {kind}: {', '.join(items[:NUM_SHOWN])}{rest}")
    return "; ".join(parts) or None
