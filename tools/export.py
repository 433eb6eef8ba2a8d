"""Export a trained ControlNet for other programs.

    python -m tools.export RUN --format ldm --dtype fp16

`ldm` writes one file, control_inpaint_<base>.safetensors, with `control_model.` names for ComfyUI
and A1111; `diffusers` writes a folder, control_inpaint_<base>/, for diffusers and IOPaint. Both
programs look for "inpaint" in the name, A1111 for the version ("sd15") too.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from inpainting.arguments import OneLineParser, answer

if TYPE_CHECKING:  # torch takes seconds to import: not before the arguments are known to be good
    import torch
    from torch import Tensor

# How the web interfaces call a base, by the width of its text encoder.
VERSION_OF_TEXT_WIDTH = {768: "sd15", 1024: "sd21"}
FP16_MAX = 65504.0


def build_parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    parser = OneLineParser(
        prog="python -m tools.export",
        description="Export a trained ControlNet for ComfyUI, A1111, IOPaint and diffusers.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="a run folder, a final_model folder or a weight file"
    )
    parser.add_argument(
        "--format",
        choices=("diffusers", "ldm"),
        default="ldm",
        help="ldm: one file for ComfyUI and A1111; diffusers: a folder (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "fp16"),
        default="fp32",
        help="fp32: exact, 1.4 GB for SD 1.5; fp16: half of that (default: %(default)s)",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="where to write (default: RUN, or the file's folder)"
    )
    return parser


def export(run: Path, *, format: str, dtype: str, output_dir: Path) -> Path:
    """Write the weights of a run for other programs.

    Args:
        run: run folder, final_model folder or weight file.
        format: "ldm" or "diffusers".
        dtype: "fp32" or "fp16".
        output_dir: made when missing.

    Returns:
        The file (ldm) or folder (diffusers) that was written.

    Raises:
        FileNotFoundError: no weights, or no config.json for the diffusers format.
        ValueError: the weights can't be read, or not be held in fp16.
    """
    import torch

    from inpainting import checkpoints, interop
    from inpainting.atomic import write_text_atomically
    from inpainting.record import RECORD_NAME

    weights_path = interop.find_weights(run)
    record = checkpoints.find_record(weights_path)
    config = _read_config(weights_path) if format == "diffusers" else {}
    weights = interop.read_controlnet_weights(weights_path)
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
    tensors = {name: _cast(tensor, torch_dtype, name) for name, tensor in weights.items()}
    name = f"control_inpaint_{_base_name(weights, record.base if record else None)}"
    output_dir.mkdir(parents=True, exist_ok=True)
    if format == "ldm":
        target = output_dir / f"{name}.safetensors"
        checkpoints.write_weights(target, tensors=interop.to_ldm(tensors), record=record)
        return target
    target = output_dir / name
    target.mkdir(exist_ok=True)
    path = target / "diffusion_pytorch_model.safetensors"
    checkpoints.write_weights(path, tensors=tensors, record=record)
    checkpoints.write_config(target / "config.json", config=config)
    if record is not None:
        write_text_atomically(target / RECORD_NAME, record.to_json())
    return target


def _read_config(weights_path: Path) -> dict:
    """Return the ControlNet's config.json: beside the weights, or in their run's final_model."""
    folder = weights_path.parent
    candidates = (folder / "config.json", folder.parent / "final_model" / "config.json")
    for path in candidates:
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    raise FileNotFoundError(
        f"--format diffusers needs the config.json of the ControlNet, got none beside "
        f"{weights_path}. Name a final_model folder, or use --format ldm."
    )


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    largest = tensor.abs().max().item()
    if dtype.itemsize == 2 and largest > FP16_MAX:
        raise ValueError(
            f"fp16 holds values up to {FP16_MAX:.0f}, got {largest} in {name}. Use --dtype fp32."
        )
    return tensor.to(dtype)


def _base_name(weights: Mapping[str, Tensor], recorded: str | None) -> str:
    """Return what stands for the base in the file's name: its version, else its own name."""
    text_widths = {
        tensor.shape[1] for name, tensor in weights.items() if name.endswith("attn2.to_k.weight")
    }
    for width, version in VERSION_OF_TEXT_WIDTH.items():
        if width in text_widths:
            return version
    return re.sub(r"[^A-Za-z0-9.-]+", "-", recorded or "").strip("-.") or "base"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = build_parser().parse_args(argv)
    return answer(lambda: _export(args))


def _export(args: argparse.Namespace) -> None:
    """Check the arguments, export, and say where."""
    if not args.run.exists():
        raise FileNotFoundError(
            f"RUN must be a run folder, a final_model folder or a weight file that "
            f"exists, got {args.run}. Check the path."
        )
    output_dir = args.output_dir or (args.run if args.run.is_dir() else args.run.parent)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir must be a folder, got the file {output_dir}. Name another.")
    target = export(args.run, format=args.format, dtype=args.dtype, output_dir=output_dir)
    print(f"wrote {target}")


if __name__ == "__main__":
    sys.exit(main())
