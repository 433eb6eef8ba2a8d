"""Measure the training step's memory with and without checkpointed activations.

    OMP_NUM_THREADS=1 python -m benchmarks.memory --size small

The project's step is imported: what trains is what is measured. Saved for backward is every storage
that autograd keeps between forward and backward, each once, parameters left out: a number that
follows from shapes and dtypes alone. On a GPU the peak of a whole step (forward, backward,
clipping, optimizer) is measured too. Every setting sees the same weights, since the learning rate
is 0, and the command fails (exit code 1) if a setting's loss or gradient parts from the plain
one's. The VAE is off the device, as in a run whose pictures are all cached. Attention is the fused
one on a CPU too, convolutions are torch's own, and autocast brings norms to float32: what is saved
there is what a GPU would save.

    python -m benchmarks.memory --size sd15 --precision bf16-mixed --shapes_only

counts what is saved from tensors that have a shape and no data: nothing is computed, and it takes
seconds and little memory at any size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.networks import SIZES, build_base, draw_batch, start_after_zero
from benchmarks.step import TOLERANCES, Project, build_project
from benchmarks.timing import describe_machine
from inpainting.arguments import module_parser
from lightning_module import FROZEN_DTYPES
from model import Base

MIB = 2**20
ZERO_CONVOLUTIONS_AT = 0.02
PLAIN = "plain"
CONTROLNET = "ControlNet checkpointed, as diffusers' example does"
BOTH = "ControlNet and frozen decoder: --gradient_checkpointing"
SETTINGS = (PLAIN, CONTROLNET, BOTH)


@dataclass(frozen=True)
class Measured:
    """What one setting takes.

    Attributes:
        saved_bytes: kept by autograd between forward and backward.
        peak_bytes: allocated on the GPU at most during a step; None on a CPU.
        loss, grad_norm: of the step, before clipping; None where nothing is computed.
        optimizer_bytes: the optimizer's state; 0 where nothing is computed.
    """

    saved_bytes: int
    peak_bytes: int | None = None
    loss: float | None = None
    grad_norm: float | None = None
    optimizer_bytes: int = 0


@contextmanager
def count_saved(networks: Iterable[nn.Module]) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Yield each storage that autograd saves, by its identity.

    Args:
        networks: their parameters are not counted, nor what shares a storage with them.
    """
    parameters = {
        parameter.untyped_storage()._cdata  # what has no data has no address either
        for network in networks
        for parameter in network.parameters()
    }
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@contextmanager
def norms_as_on_a_gpu() -> Iterator[None]:
    """Let a CPU's autocast bring norms to float32, as CUDA's does.

    Source: PyTorch's documentation, "CUDA Ops that can autocast to float32".
    """

    def in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compute(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            is_cast = torch.is_autocast_enabled("cpu")
            return norm(input.float() if is_cast else input, *args, **kwargs)

        return compute

    with (
        mock.patch.object(F, "group_norm", in_float32(F.group_norm)),
        mock.patch.object(F, "layer_norm", in_float32(F.layer_norm)),
    ):
        yield


def measure_setting(project: Project, *, shapes_only: bool) -> Measured:
    """Count what a forward pass saves, then take a step, and one whose peak is measured."""
    module, device = project.module, project.module.device
    with count_saved([module.controlnet, module.base.unet, module.base.text_encoder]) as saved:
        loss = module.training_step(project.batches[0], 0)
    saved_bytes = sum(storage.nbytes() for storage in saved.values())
    if shapes_only:
        return Measured(saved_bytes)
    saved.clear()
    del loss
    project.step()  # the optimizer's state appears
    grad_norm, peak = module.grad_norm, None
    assert grad_norm is not None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        project.step()
        peak = torch.cuda.max_memory_allocated(device)
    return Measured(
        saved_bytes=saved_bytes,
        peak_bytes=peak,
        loss=float(project.losses[-1]),
        grad_norm=float(grad_norm),
        optimizer_bytes=sum(map(nbytes, tensors_of(project.optimizer.state_dict()["state"]))),
    )


def nbytes(tensor: Tensor) -> int:
    """Return what a tensor's elements take."""
    return tensor.numel() * tensor.element_size()


def tensors_of(state: dict[Any, Any]) -> Iterator[Tensor]:
    """Yield the tensors of a nested state."""
    for value in state.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_of(value)


def build_networks(args: argparse.Namespace) -> tuple[Base, ControlNetModel]:
    """Build the frozen networks and what trains, on the device; the VAE stays on the CPU."""
    device = torch.device("meta" if args.shapes_only else args.device)
    with device if args.shapes_only else nullcontext():
        base = build_base(SIZES[args.size])
        torch.manual_seed(0)
        controlnet = ControlNetModel.from_unet(base.unet).train()
    controlnet.to(device)  # type: ignore[call-arg]
    start_after_zero(controlnet, std=ZERO_CONVOLUTIONS_AT)
    dtype, vae_dtype = FROZEN_DTYPES[args.precision]
    base.to(device, dtype=dtype, vae_dtype=vae_dtype)
    if not args.shapes_only:
        base.move_vae(torch.device("cpu"))
    return base, controlnet


def take_data_away(base: Base, controlnet: ControlNetModel) -> None:
    """Give each parameter and buffer a new tensor of its shape, under a FakeTensorMode."""
    for network in (base.unet, base.text_encoder, controlnet):
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    num_timesteps = base.noise_scheduler.config["num_train_timesteps"]
    base.noise_scheduler.alphas_cumprod = torch.empty(num_timesteps)


def measure(args: argparse.Namespace) -> tuple[str, bool]:
    """Measure the settings.

    Returns:
        the tables as markdown, and whether all losses and gradients stayed together.
    """
    device, size = torch.device(args.device), SIZES[args.size]
    base, controlnet = build_networks(args)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if args.shapes_only else nullcontext()
    drawn: Any = draw_batch(
        size, image_size=args.image_size, batch_size=args.batch_size, seed=0
    )  # fmt: skip
    drawn["moments"] = torch.cat([drawn["noise"], drawn["posterior_noise"]], dim=1).half()
    batch: Any = {name: v if name == "prompt" else v.to(device) for name, v in drawn.items()}
    found = {}
    if args.shapes_only:
        with mode:
            take_data_away(base, controlnet)
    norms = norms_as_on_a_gpu if device.type == "cpu" else nullcontext
    for setting in SETTINGS:
        controlnet.disable_gradient_checkpointing()
        base.unet.disable_gradient_checkpointing()
        project = build_project(
            base, controlnet, batches=[batch], precision=args.precision, learning_rate=0.0,
            gradient_checkpointing=setting == BOTH, use_8bit_adam=args.use_8bit_adam,
        )  # fmt: skip
        if setting == CONTROLNET:
            controlnet.enable_gradient_checkpointing()
        with mode, norms():
            found[setting] = measure_setting(project, shapes_only=args.shapes_only)
        del project  # its optimizer's state, before the next one's
        controlnet.zero_grad(set_to_none=True)
    heading = (
        f"{args.size}, {args.image_size} px, batch {args.batch_size}, {args.precision}; "
        f"{describe_machine(device)}"
    )
    table, is_same = compare(found, tolerance=TOLERANCES[args.precision])
    kept = list_kept(base, controlnet, optimizer_bytes=found[PLAIN].optimizer_bytes)
    return f"{heading}\n\n{table}\n\n{kept}", is_same


def compare(found: dict[str, Measured], *, tolerance: float) -> tuple[str, bool]:
    """Return the settings' table, and whether all of them computed what the plain one did."""
    plain = found[PLAIN]
    lines = [
        "| setting | saved for backward, MiB | of plain's | peak of a step on the GPU, MiB | "
        "largest difference of loss and gradient |",
        "|---|---|---|---|---|",
    ]
    is_same = True
    for setting, got in found.items():
        if got.loss is None or got.grad_norm is None or not plain.loss or not plain.grad_norm:
            said = "not computed"
        else:
            difference = max(
                abs(got.loss - plain.loss) / plain.loss,
                abs(got.grad_norm - plain.grad_norm) / plain.grad_norm,
            )
            has_parted = not difference <= tolerance  # NaN parts too
            is_same &= not has_parted
            said = f"{difference:.1e}"
            said += f" PARTED: at most {tolerance:.0e}" if has_parted else ""
        peak = "not measured" if got.peak_bytes is None else f"{got.peak_bytes / MIB:.1f}"
        lines.append(
            f"| {setting} | {got.saved_bytes / MIB:.1f} | "
            f"{got.saved_bytes / plain.saved_bytes:.3f} | {peak} | {said} |"
        )
    return "\n".join(lines), is_same


def list_kept(base: Base, controlnet: ControlNetModel, *, optimizer_bytes: int) -> str:
    """Return the table of what is there all the time, whatever the setting."""
    parts = {
        "frozen UNet": size_of(base.unet),
        "text encoder": size_of(base.text_encoder),
        "ControlNet": size_of(controlnet),
        "its gradients": size_of(controlnet),
    }
    if optimizer_bytes:
        parts["optimizer"] = optimizer_bytes
    parts["together"] = sum(parts.values())
    parts["VAE, off the device when all pictures are cached"] = size_of(base.vae)
    lines = [f"| {name} | {value / MIB:.1f} |" for name, value in parts.items()]
    return "\n".join(["| kept all the time | MiB |", "|---|---|", *lines])


def size_of(network: nn.Module) -> int:
    """Return the bytes of a network's parameters."""
    return sum(nbytes(parameter) for parameter in network.parameters())


def build_parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    parser = module_parser("benchmarks.memory", manual=__doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="of the networks (default small)")
    add("--image_size", type=int, help="pixels (default tiny 64, small 256, sd15 512)")
    add("--batch_size", type=int, default=1, help="(default 1)")
    add("--precision", choices=TOLERANCES, default="32", help="(default 32)")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--use_8bit_adam", action="store_true", help="as in training: needs bitsandbytes")
    add("--shapes_only", action="store_true", help="count what is saved, and compute nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 if losses or gradients parted."""
    args = build_parser().parse_args(argv)
    args.image_size = args.image_size or SIZES[args.size].image_size
    table, is_same = measure(args)
    print(table)
    if not is_same:
        print("error: a setting's loss or gradient parts from the plain one's", file=sys.stderr)
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
