"""Time the training step against a reference step equal in work to diffusers' example.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m benchmarks.step --size small

The reference is written from diffusers alone, after its train_controlnet.py. The project's step is
imported: what trains is what is timed. Every row starts from the same weights and sees the same
batches with the same noise, and the command fails (exit code 1) if a row's losses part from the
reference's: a step that computes something else is not faster. Rows take turns, the reference comes
twice as the noise floor, and `reference + ...` has one optimisation alone. What a process has as a
whole, all rows have: a CPU keeps the memory that it frees.

MFU is the share of what the device reaches in a large matrix product (on a GPU in bf16); what a
step must compute is counted (2 per multiplication and addition, convolutions as they are defined),
the encoder's part only where the row encodes, recomputation never. On a GPU a step's kernels are
counted, and how often it waits for the GPU.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.limits import count_launches, matrix_flops_per_s
from benchmarks.networks import SIZES, STRIDE, build_base, draw_batch, start_after_zero
from benchmarks.timing import Spread, describe_machine, ratios, take_turns
from data import Sample
from inpainting.arguments import module_parser
from inpainting.devices import keep_freed_memory
from lightning_module import FROZEN_DTYPES, InpaintingControlNet
from model import Base, build_controlnet, choose_kernels

LEARNING_RATE = 1e-5
CLIP_NORM = 1.0
NUM_BATCHES = 4
ZERO_CONVOLUTIONS_AT = 0.1
# How far a row's losses may be from the reference's. fp32: another order of additions, and cached
# moments rounded to float16. bf16: rounding everywhere.
TOLERANCES = {"32": 1e-5, "bf16-mixed": 1e-2}
REFERENCE, AGAIN = "reference", "reference again (A/A)"
REGIONAL, FULL = "project, cached, --compile regional", "project, cached, --compile full"
# torch's fused attentions. Which of them is taken is torch's choice, but for these rows.
BACKENDS = {
    "project, cached, flash attention": SDPBackend.FLASH_ATTENTION,
    "project, cached, memory-efficient attention": SDPBackend.EFFICIENT_ATTENTION,
    "project, cached, cuDNN's attention": SDPBackend.CUDNN_ATTENTION,
}


@dataclass
class Reference:
    """The step of diffusers' train_controlnet.py, with what it is given drawn beforehand.

    Attributes:
        base: the frozen networks, in the dtype that the example casts them to.
        controlnet: float32.
        precision: "32" or "bf16-mixed".
        batches: what is trained on, in turns; with moments in them nothing is encoded.
        is_fused: AdamW as one kernel.
        losses: each step's.
    """

    base: Base
    controlnet: ControlNetModel
    precision: str
    batches: list[Sample]
    is_fused: bool = False
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.controlnet.parameters(), lr=LEARNING_RATE, weight_decay=1e-2,
            fused=self.is_fused or None,
        )  # fmt: skip

    def step(self) -> None:
        """Take one optimizer step."""
        batch = self.batches[len(self.losses) % len(self.batches)]
        base, dtype = self.base, self.base.unet.dtype
        timesteps, noise = batch["timestep"], batch["noise"]
        latents = self._latents(batch)
        noisy_latents = base.noise_scheduler.add_noise(
            latents.float(), noise.float(), timesteps  # type: ignore[arg-type]
        ).to(dtype)  # fmt: skip
        with torch.no_grad():
            hidden = base.text_encoder(batch["input_ids"], return_dict=False)[0]
        control = batch["image"] / 255
        control = torch.where(batch["mask"].bool(), -torch.ones_like(control), control)
        device_type = noise.device.type
        is_mixed = self.precision == "bf16-mixed"
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=is_mixed):
            down, mid = self.controlnet(
                noisy_latents, timesteps, encoder_hidden_states=hidden,
                controlnet_cond=control.to(dtype), return_dict=False,
            )  # fmt: skip
        # The example's accelerate gives a prepared model's outputs back in float32.
        down = [sample.float().to(dtype) for sample in down]
        model_pred = base.unet(
            noisy_latents, timesteps, encoder_hidden_states=hidden,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid.float().to(dtype), return_dict=False,
        )[0]  # fmt: skip
        loss = F.mse_loss(model_pred.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.controlnet.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach().item())

    @torch.no_grad()
    def _latents(self, batch: Sample) -> Tensor:
        vae = self.base.vae
        moments = batch.get("moments")
        if moments is not None:
            mean, log_variance = moments.to(vae.dtype).chunk(2, dim=1)
        else:
            pixels = (batch["image"] / 127.5 - 1).to(vae.dtype)
            posterior = vae.encode(pixels).latent_dist  # type: ignore[union-attr]
            mean, log_variance = posterior.mean, posterior.logvar
        std = torch.exp(0.5 * log_variance)
        return (mean + std * batch["posterior_noise"]) * vae.config["scaling_factor"]


@dataclass
class Project:
    """The project's own training step, clipping and optimizer, without Lightning's loop.

    Attributes:
        module: what trains.
        batches: what is trained on, in turns; with moments in them nothing is encoded.
        attention: what is tried, in this order; None: in torch's own.
        losses: each step's.
    """

    module: InpaintingControlNet
    batches: list[Sample]
    attention: list[SDPBackend] | None = None
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        trainer: Any = SimpleNamespace(strategy=None)  # the optimizer asks for the strategy alone
        self.module.trainer = trainer
        configuration: Any = self.module.configure_optimizers()
        self.optimizer = configuration["optimizer"]

    def step(self) -> None:
        """Take one optimizer step."""
        batch = self.batches[len(self.losses) % len(self.batches)]
        with sdpa_kernel(self.attention, set_priority=True) if self.attention else nullcontext():
            loss = self.module.training_step(batch, 0)
            loss.backward()
        self.module.configure_gradient_clipping(self.optimizer, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())  # type: ignore[arg-type]


def build_rows(args: argparse.Namespace) -> dict[str, Reference | Project]:
    """Build every row that was asked for, each with a ControlNet and an optimizer of its own."""
    device, size = torch.device(args.device), SIZES[args.size]
    base = build_base(size)
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(base.unet).train().to(device)  # type: ignore[call-arg]
    start_after_zero(controlnet, std=ZERO_CONVOLUTIONS_AT)
    own_controlnet = build_controlnet(base.unet, stride=STRIDE).to(device)  # type: ignore[call-arg]
    own_controlnet.load_state_dict(controlnet.state_dict())
    dtype, vae_dtype = FROZEN_DTYPES[args.precision]
    base.to(device, dtype=dtype, vae_dtype=vae_dtype)
    drawn: Any = [
        draw_batch(size, image_size=args.image_size, batch_size=args.batch_size, seed=seed)
        for seed in range(NUM_BATCHES)
    ]
    batches: Any = [{n: v if n == "prompt" else v.to(device) for n, v in b.items()} for b in drawn]
    cached = [{**batch, "moments": encode(base, batch["image"])} for batch in batches]

    own_base = replace(base, vae=copy.deepcopy(base.vae), unet=copy.deepcopy(base.unet))
    choose_kernels(own_base.vae, own_base.unet)

    def reference(batches: Any = batches, *, is_fused: bool = False) -> Reference:
        network = copy.deepcopy(controlnet)
        network.set_attn_processor(AttnProcessor2_0())  # type: ignore[arg-type]
        return Reference(base, network, args.precision, batches, is_fused)

    def project(
        batches: Any, *, compile_mode: str = "off", first: SDPBackend | None = None
    ) -> Project:
        row_base = own_base
        if compile_mode != "off":  # changes the UNet
            row_base = replace(own_base, unet=copy.deepcopy(own_base.unet))
        row = build_project(
            row_base, copy.deepcopy(own_controlnet), batches=batches, precision=args.precision,
            compile_mode=compile_mode,
        )  # fmt: skip
        if first is not None:  # the others compute what it can't
            row.attention = [first, *BACKENDS.values(), SDPBackend.MATH]
        return row

    builders: Mapping[str, Callable[[], Reference | Project]] = {
        REFERENCE: reference,
        AGAIN: reference,
        "reference + fused AdamW": lambda: reference(is_fused=True),
        "reference + cached moments": lambda: reference(cached),
        "project, nothing cached": lambda: project(batches),
        "project, cached": lambda: project(cached),
        REGIONAL: lambda: project(cached, compile_mode="regional"),
        FULL: lambda: project(cached, compile_mode="full"),
    } | {name: partial(project, cached, first=backend) for name, backend in BACKENDS.items()}
    return {name: builders[name]() for name in builders if name == REFERENCE or name in args.rows}


def build_project(
    base: Base,
    controlnet: ControlNetModel,
    *,
    batches: list[Sample],
    precision: str,
    learning_rate: float = LEARNING_RATE,
    gradient_checkpointing: bool = False,
    use_8bit_adam: bool = False,
    compile_mode: str = "off",
) -> Project:
    """Build what trains, around networks that are on their device already."""
    device = controlnet.device
    module = InpaintingControlNet(
        base=base, controlnet=controlnet, num_training_steps=1_000_000,
        learning_rate=learning_rate, adam_weight_decay=1e-2, lr_scheduler="constant",
        lr_warmup_steps=0, snr_gamma=None, ema_decay=None, precision=precision,
        gradient_checkpointing=gradient_checkpointing, use_8bit_adam=use_8bit_adam,
        compile_mode=compile_mode, moments_cache=None,
    )  # fmt: skip
    if module.device != device:  # Lightning's record of where the networks are already
        module.to(device)
    module.loss_sums = module.loss_sums.to(device)
    module.finite_steps.to(device)
    return Project(module, batches)


def encode(base: Base, image: Tensor) -> Tensor:
    """Encode (B, 3, H, W) uint8 as the cache does: (B, 2C, h, w) float16."""
    moments = [torch.from_numpy(base.encode_alone(picture)) for picture in image]
    return torch.stack(moments).to(image.device)


def is_cached(row: Reference | Project) -> bool:
    """Tell whether a row's steps encode nothing."""
    return "moments" in row.batches[0]


def count_flops(reference: Reference, batch: Sample) -> int:
    """Count what a step must compute for the first picture of a batch."""
    picture: Any = {name: value[:1] for name, value in batch.items()}  # type: ignore[index]
    row = replace(
        reference, controlnet=copy.deepcopy(reference.controlnet), batches=[picture], losses=[]
    )
    # As plain products attention is counted on every device, and without what is recomputed.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        row.step()
    return counter.get_total_flops()


def measure(args: argparse.Namespace) -> tuple[str, bool]:
    """Time the rows in turns.

    Returns:
        the table as markdown, and whether all losses stayed together.
    """
    device = torch.device(args.device)
    keep_freed_memory(device.type)
    rows = build_rows(args)
    reference = rows[REFERENCE]
    assert isinstance(reference, Reference)
    some_batch = {is_cached(row): row.batches[0] for row in rows.values()}
    flops = {cached: count_flops(reference, batch) for cached, batch in some_batch.items()}

    def steps_of(row: Reference | Project) -> Callable[[], None]:
        def take_steps() -> None:
            for _ in range(args.num_steps):
                row.step()

        return take_steps

    times = take_turns(
        {name: steps_of(row) for name, row in rows.items()},
        num_rounds=args.num_rounds, device=device,
    )  # fmt: skip
    expected = torch.tensor(reference.losses)
    limit = matrix_flops_per_s(device, args.precision)
    lines = [
        f"{args.size}, {args.image_size} px, batch {args.batch_size}, {args.precision}, "
        f"{args.num_rounds} rounds of {args.num_steps} steps; {describe_machine(device)}; "
        f"a large matrix product: {limit / 1e12:.2f} TFLOP/s",
        "",
        f"| row | {'GPU' if device.type == 'cuda' else 'CPU'} ms per step (quartiles) | "
        "times as fast (quartiles) | samples per s of it | GFLOP per sample | MFU | "
        "kernels, waits | largest difference of a loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    is_same = True
    for name, row in rows.items():
        losses = torch.tensor([float(loss) for loss in row.losses])
        difference = float(((losses - expected).abs() / expected).max())
        tolerance = TOLERANCES[args.precision]
        has_parted = not difference <= tolerance  # NaN parts too
        is_same &= not has_parted
        per_step = Spread.of([time / args.num_steps for time in times[name]])
        per_s, needed = 1e3 * args.batch_size / per_step.median, flops[is_cached(row)]
        launches = "not on a CPU"
        if device.type == "cuda":
            launches = "{}, {}".format(*count_launches(row.step))
        remark = f" PARTED: at most {tolerance:.0e}" if has_parted else ""
        lines.append(
            f"| {name} | {per_step} | {Spread.of(ratios(times[REFERENCE], times[name]))} | "
            f"{per_s:.2f} | {needed / 1e9:.4g} | {per_s * needed / limit:.0%} | {launches} | "
            f"{difference:.1e}{remark} |"
        )
    return "\n".join(lines), is_same


def build_parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    parser = module_parser("benchmarks.step", manual=__doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="of the networks (default small)")
    add("--image_size", type=int, help="pixels (default tiny 64, small 256, sd15 512)")
    add("--batch_size", type=int, default=1, help="(default 1)")
    add("--precision", choices=TOLERANCES, default="32", help="(default 32)")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--num_rounds", type=int, default=15, help="(default 15)")
    add("--num_steps", type=int, default=2, help="per row and round (default 2)")
    add("--rows", nargs="+", default=list(ROWS), choices=ROWS + MORE_ROWS, metavar="ROW",
        help=f"beside the reference (default {', '.join(ROWS)}; and {', '.join(MORE_ROWS)})",
    )  # fmt: skip
    return parser


ROWS = (
    AGAIN, "reference + fused AdamW", "reference + cached moments", "project, nothing cached",
    "project, cached",
)  # fmt: skip
# Slow to start; and what differs on a GPU alone.
MORE_ROWS = (REGIONAL, FULL, *BACKENDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 if the losses parted."""
    args = build_parser().parse_args(argv)
    args.image_size = args.image_size or SIZES[args.size].image_size
    table, is_same = measure(args)
    print(table)
    if not is_same:
        print("error: a row's losses part from the reference's", file=sys.stderr)
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
