"""Which Trainer the flags describe: callbacks in their order, logger, precision, strategy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import profilers
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor

from inpainting.runs import is_first_process
from lightning_callbacks import (
    AverageWeights,
    Curves,
    ProgressBar,
    RunLogger,
    TrainingPictures,
    ValidationInpaintings,
)
from lightning_checkpoints import (
    AtomicCheckpointIO,
    LastCheckpoint,
    NamedCheckpoint,
    StopAtMaxSteps,
    StopOnSignal,
)
from lightning_data import CountUnreadable, InpaintingDataModule
from lightning_faults import EndTogether, StartTogether


class StopWithoutProgress(EarlyStopping):
    """EarlyStopping whose patience is the flag's, in a resumed run too."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over how long it has waited, not for how long it would have."""
        super().load_state_dict({**state_dict, "patience": self.patience})


class NoProfiler(profilers.PassThroughProfiler):
    """Measures nothing, as Lightning's own, which makes a generator for each of 80 hooks a step."""

    _context = nullcontext()

    def profile(self, action_name: str) -> Any:
        """Return a context that does nothing."""
        return self._context


class DeepSpeedAutocast(DeepSpeedPrecision):
    """--precision under DeepSpeed as everywhere else: the training step's autocast, fp32 weights.

    Lightning's own would cast the weights and the samples' noise to 16 bits, and mix nothing.
    Only fp16 keeps 16-bit weights: its loss scale is DeepSpeed's.

    Args:
        precision: "32", "bf16-mixed" or "16-mixed".
    """

    def __init__(self, precision: str) -> None:
        super().__init__("16-mixed" if precision == "16-mixed" else "32-true")

    def convert_input(self, data: Any) -> Any:
        """Leave the batch as it is."""
        return data

    def backward(
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Let the accumulated steps be averaged once: Lightning has divided already."""
        model.trainer.model.backward(tensor, scale_wrt_gas=False)  # type: ignore[union-attr]


def build_trainer(
    args: argparse.Namespace,
    *,
    run_dir: Path,
    datamodule: InpaintingDataModule,
    position: pl.Callback,
    keeper: pl.Callback,
    start: dict[str, Any],
    purge_step: int | None,
) -> pl.Trainer:
    """Wire flags, callbacks and folders into Lightning's Trainer.

    Args:
        args: the resolved flags.
        run_dir: where everything is written to.
        datamodule: tells whether there is a validation split.
        position: the datamodule's ResumePosition.
        keeper: the run's KeepRunFolder.
        start: what the run starts from, which all of its processes must agree on.
        purge_step: a resumed run's first new step: later points of its curves are dropped.
    """
    has_validation = len(datamodule.val_set) > 0
    stop = StopOnSignal()
    # The order matters: the position and the average move on before last.ckpt is written.
    callbacks = [
        EndTogether(),
        StartTogether(start),
        position,
        CountUnreadable(datamodule.unreadable),
        keeper,
        *([AverageWeights()] if args.ema_decay else []),
        Curves(every_n_steps=args.log_every_n_steps),
        *([TrainingPictures(every_n_steps=args.log_images_every_n_steps)]
          if args.log_images_every_n_steps else []),
        *([ValidationInpaintings(datamodule.val_set)] if has_validation else []),
        *([StopWithoutProgress("val/loss", patience=args.early_stopping_patience)]
          if args.early_stopping_patience else []),
        ProgressBar(),
        stop,
        StopAtMaxSteps(),
        NamedCheckpoint(
            run_dir / "checkpoints",
            every_n_epochs=args.save_every_n_epochs,
            save_top_k=args.save_top_k,
            monitor=args.monitor,
        ),
        LastCheckpoint(
            run_dir / "checkpoints", every_n_steps=args.save_every_n_steps, stop=stop
        ),
    ]  # fmt: skip
    is_deepspeed = args.strategy.startswith("deepspeed")
    return pl.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.num_nodes,
        strategy=build_strategy(args),
        precision=None if is_deepspeed else args.precision,
        max_epochs=args.num_epochs,
        max_steps=args.max_steps,
        limit_train_batches=args.limit_train_batches,
        accumulate_grad_batches=args.accumulate_grad_batches,
        gradient_clip_val=args.gradient_clip_val or None,
        deterministic=args.deterministic or None,
        log_every_n_steps=args.log_every_n_steps,
        logger=RunLogger(run_dir, name="", version="", purge_step=purge_step),
        callbacks=callbacks,
        plugins=build_plugins(args),
        # Not the working folder: Lightning would start from an hpc_ckpt_1.ckpt that it finds there.
        default_root_dir=run_dir,
        profiler=_build_profiler(args.profiler if is_first_process() else None, run_dir=run_dir),
        num_sanity_val_steps=1,
        use_distributed_sampler=False,
        enable_model_summary=False,
    )


def build_plugins(args: argparse.Namespace) -> list[Any]:
    """Return what of Lightning's own is replaced: how files are written, DeepSpeed's precision."""
    plugins: list[Any] = [AtomicCheckpointIO()]
    if args.strategy.startswith("deepspeed"):
        plugins = [DeepSpeedAutocast(args.precision)]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning would save from within a signal's handler, and queue the job by itself.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return plugins


def least_world_size(args: argparse.Namespace) -> int:
    """Return the number of processes: one a device, and -1 are all GPUs."""
    num_devices = len(args.devices) if isinstance(args.devices, list) else args.devices
    if num_devices == -1:
        num_devices = torch.cuda.device_count() if args.accelerator == "gpu" else 1
    return max(num_devices, 1) * args.num_nodes


def build_strategy(args: argparse.Namespace) -> str | Strategy:
    """Return --strategy; DDP with gradients that are kept once, not beside its buckets too."""
    if args.strategy == "ddp" or (args.strategy == "auto" and least_world_size(args) > 1):
        return DDPStrategy(gradient_as_bucket_view=True)
    return args.strategy


def _build_profiler(name: str | None, *, run_dir: Path) -> Any:
    classes: dict[str, Callable[..., Any]] = {
        "simple": profilers.SimpleProfiler,
        "advanced": profilers.AdvancedProfiler,
        "pytorch": profilers.PyTorchProfiler,
    }
    return classes[name](dirpath=run_dir, filename="profile") if name else NoProfiler()
