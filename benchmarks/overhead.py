"""Time our Lightning loop against a raw loop: what bar, curves and checkpoints cost per step.

    OMP_NUM_THREADS=1 python -m benchmarks.overhead

Both loops run the same module, optimizer and loader, with a loss and samples that cost next to
nothing. A long run less a short one leaves out the start and the end; last.ckpt is written every
1000 steps.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.timing import Spread, describe_machine
from data import CocoInpaintingDataset
from demo.random_base import write_random_base
from demo.scenes import write_scenes
from inpainting.arguments import module_parser
from inpainting.coco import CocoIndex
from inpainting.flags import build_parser as build_training_parser
from inpainting.preflight import resolve_device
from inpainting.quiet import quiet_libraries
from lightning_run import Run, assemble

NUM_SCENES = 8
SIZE_PX = 64
ENDLESS = 1_000_000  # samples in an epoch: its end is not what is timed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    quiet_libraries()
    ours, raw = [], []
    handlers = logging.getLogger().handlers[:]
    with tempfile.TemporaryDirectory() as folder:
        flags = prepare(Path(folder))
        for turn in range(args.num_rounds):
            loops = [(ours, fit), (raw, loop_raw)]
            for times, loop in loops[:: -1 if turn % 2 else 1]:
                short = loop(flags, num_steps=args.num_steps)
                long = loop(flags, num_steps=2 * args.num_steps)
                times.append((long - short) / args.num_steps)
    logging.getLogger().handlers[:] = handlers  # each run added its run.log
    overhead = Spread.of([one - other for one, other in zip(ours, raw, strict=True)])
    print(f"{args.num_rounds} rounds of {args.num_steps} steps; "
          f"{describe_machine(torch.device('cpu'))}\n")  # fmt: skip
    print("| loop | CPU ms per step (quartiles) |\n|---|---|")
    print(f"| Lightning with bar, curves and checkpoints | {Spread.of(ours)} |")
    print(f"| raw | {Spread.of(raw)} |")
    print(f"| what the first costs more | {overhead} |")
    return 0


def prepare(folder: Path) -> list[str]:
    """Write scenes and a tiny base; returns the flags of a training with them."""
    write_scenes(folder / "scenes", num_scenes=NUM_SCENES, size=SIZE_PX, seed=0)
    return [
        "--image_dir", str(folder / "scenes" / "images"),
        "--pretrained_model_name_or_path", str(write_random_base(folder / "base")),
        "--output_dir", str(folder / "outputs"), "--cache_latents", "off",
        "--image_size", str(SIZE_PX), "--batch_size", "1", "--num_workers", "0",
        "--val_split", "0", "--num_epochs", "1000000", "--save_every_n_epochs", "1000000",
        "--log_images_every_n_steps", "0", "--accelerator", "cpu",
    ]  # fmt: skip


def build_run(flags: list[str], *, num_steps: int) -> Run:
    """Assemble a run as the command does, with a loss and samples that cost nothing."""
    args = build_training_parser().parse_args([*flags, "--max_steps", str(num_steps)])
    args.prediction_type, args.uses_demo_base, args.monitor = "epsilon", False, "train_loss"
    resolve_device(args)
    cache = Path(args.output_dir).parent / "index"
    index = CocoIndex.from_folder(Path(args.image_dir), cache_dir=cache)
    run = assemble(args, index=index, unreadable_rows=(), checkpoint_path=None)
    run.module.loss = lambda batch, controlnet: free_loss(controlnet)  # type: ignore[method-assign, assignment, return-value]
    repeat_one_sample(run.datamodule.train_set)
    return run


def free_loss(controlnet: torch.nn.Module) -> Tensor:
    """Return a loss (1,) that touches one parameter."""
    return next(controlnet.parameters()).flatten()[:1].square()


def repeat_one_sample(dataset: CocoInpaintingDataset) -> None:
    """Let a dataset build its first sample once, for an epoch that doesn't end."""
    sample = dataset[0, 0]
    dataset.rows = np.zeros(ENDLESS, dtype=np.int64)
    picture = dataset.index.open_picture(0)
    dataset.index.open_picture = lambda row: picture  # type: ignore[method-assign]
    dataset._build_sample = lambda row, *, picture, epoch: sample  # type: ignore[method-assign]


def fit(flags: list[str], *, num_steps: int) -> float:
    """Train as the command does; returns CPU ms."""
    run = build_run(flags, num_steps=num_steps)
    with redirect_stdout(io.StringIO()):  # the bar is drawn, and not shown
        start = time.process_time()
        run.trainer.fit(run.module, datamodule=run.datamodule)
        return (time.process_time() - start) * 1e3


def loop_raw(flags: list[str], *, num_steps: int) -> float:
    """Train with nothing around the step; returns CPU ms."""
    run = build_run(flags, num_steps=num_steps)
    run.trainer.strategy.connect(run.module)
    run.module.trainer = run.trainer
    optimizer = run.module.configure_optimizers()["optimizer"]  # type: ignore[index, call-overload]
    addresses = [[(0, step)] for step in range(num_steps)]
    loader = DataLoader(run.datamodule.train_set, batch_sampler=addresses)
    start = time.process_time()
    for number, batch in enumerate(loader):
        run.module.training_step(batch, number).backward()
        run.module.configure_gradient_clipping(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return (time.process_time() - start) * 1e3


def build_parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    parser = module_parser("benchmarks.overhead", manual=__doc__)
    add = parser.add_argument
    add("--num_rounds", type=int, default=5, help="(default 5)")
    add(
        "--num_steps",
        type=int,
        default=1000,
        help="of the short run (default 1000); the long one has twice as many",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
