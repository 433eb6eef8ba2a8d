"""Train an inpainting ControlNet: flags -> check -> build -> fit -> export -> say where it is.

Nothing heavy is imported before the flags are parsed and checked: --help and mistakes answer at
once.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from inpainting.flags import DEFAULT_BASE, build_parser
from inpainting.masks import check_area_range
from inpainting.preflight import check_flags, check_image_size, resolve_device
from inpainting.runs import (
    cache_dir,
    find_checkpoint,
    is_first_process,
    new_run_dir,
    read_checkpoint,
    run_dir_of,
    write_run_json,
)

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from matplotlib.figure import Figure

    from inpainting.base import BaseConfig
    from inpainting.checkpoints import InpaintingRecord
    from inpainting.coco import CocoIndex
    from lightning_data import InpaintingDataModule
    from lightning_module import InpaintingControlNet
    from model import Base

logger = logging.getLogger("train_lightning")

# What a user can cause: one line and exit code 2.
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logger.setLevel(logging.INFO if is_first_process() else logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run = prepare(args)
        return 0 if run is None else train(run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


class UserError(Exception):
    """Something that the user can put right: shown in one line."""


@dataclass
class Run:
    """A run that is ready to start.

    Attributes:
        args: the resolved flags: nothing is left to be chosen.
        trainer, module, datamodule: Lightning's three.
        record: how the weights will have to be used.
        run_dir: the run's folder; a placeholder on all but the first process.
        checkpoint_path: what to resume from, or None.
    """

    args: argparse.Namespace
    trainer: pl.Trainer
    module: InpaintingControlNet
    datamodule: InpaintingDataModule
    record: InpaintingRecord
    run_dir: Path
    checkpoint_path: Path | None


def prepare(args: argparse.Namespace) -> Run | None:
    """Check and build everything before training; None where there is nothing to train.

    Raises:
        UserError: whatever is wrong, in one line.
    """
    try:
        for line in check_flags(args):
            logger.warning("warning: %s", line)
        check_area_range(*args.mask_area_range)
        return _build(args)
    except USER_ERRORS as error:
        raise UserError(" ".join(str(error).split())) from error


def _build(args: argparse.Namespace) -> Run | None:
    _name_the_data(args)
    _quiet_libraries()
    from inpainting.base import read_base_config
    from model import check_prediction_type

    config = read_base_config(args.pretrained_model_name_or_path, base_config=args.base_config)
    check_prediction_type(config, args.prediction_type)
    if args.prediction_type == "auto":
        args.prediction_type = config.prediction_type
    args.image_size = args.image_size or config.image_size
    check_image_size(args.image_size, config=config)
    resolve_device(args)
    checkpoint_path = None
    if args.resume_from_checkpoint:
        checkpoint_path = find_checkpoint(
            args.resume_from_checkpoint, output_dir=Path(args.output_dir)
        )
    index = _read_index(args)
    if args.dry_run:
        _print_dry_run(args, config=config, num_images=len(index))
        return None
    return _assemble(args, index=index, checkpoint_path=checkpoint_path)


def _name_the_data(args: argparse.Namespace) -> None:
    """Without --image_dir: the demo's scenes, and, unless one is named, the demo's base."""
    args.uses_demo_base = False
    if args.image_dir is None:
        from demo.defaults import prepare_demo

        logger.info("no --image_dir: training on the demo's drawn scenes")
        demo = prepare_demo(cache_dir() / "demo")
        args.image_dir, args.ann_file, args.caption_file = map(
            str, (demo.image_dir, demo.ann_file, demo.caption_file)
        )
        if args.pretrained_model_name_or_path is None:
            logger.info("no --pretrained_model_name_or_path: with the demo's small base")
            args.pretrained_model_name_or_path = str(demo.base_dir)
            args.uses_demo_base = True
    if args.pretrained_model_name_or_path is None:
        args.pretrained_model_name_or_path = DEFAULT_BASE


def _quiet_libraries() -> None:
    """Silence what libraries say about themselves; their errors and our own lines remain."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR_LOG_LEVEL", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\b")
    import diffusers
    import pytorch_lightning  # noqa: F401 - sets its loggers' levels when it is imported
    import transformers

    for name in ("pytorch_lightning", "lightning_fabric", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def _read_index(args: argparse.Namespace) -> CocoIndex:
    """Read the records, from the cache where it is up to date, and say what was left out."""
    from inpainting.coco import CocoIndex

    image_dir, cache = Path(args.image_dir), cache_dir() / "index"
    caption_file = Path(args.caption_file) if args.caption_file else None
    if args.ann_file:
        index = CocoIndex.from_annotations(
            image_dir, ann_file=Path(args.ann_file), caption_file=caption_file, cache_dir=cache
        )
    else:
        index = CocoIndex.from_folder(image_dir, caption_file=caption_file, cache_dir=cache)
    for kind, problem in index.problems.items():
        logger.warning(
            "warning: %d left out: %s (%s)", problem.count, kind, ", ".join(problem.examples)
        )
    if len(index) < 2 and args.val_split > 0:
        raise ValueError(
            f"--image_dir must hold at least two pictures to split, got {len(index)}. "
            "Add pictures, or set --val_split 0."
        )
    return index


def _print_dry_run(args: argparse.Namespace, *, config: BaseConfig, num_images: int) -> None:
    from model import estimate_sizes

    sizes = estimate_sizes(config, precision=args.precision, has_average=bool(args.ema_decay))
    for name, value in sorted(vars(args).items()):
        print(f"{name:32} {value}")
    num_devices = len(args.devices) if isinstance(args.devices, list) else max(args.devices, 1)
    effective_batch = args.batch_size * num_devices * args.num_nodes * args.accumulate_grad_batches
    num_train = round(num_images * (1 - args.val_split))
    print(f"\n{num_images} pictures, about {num_train} of them train")
    print(f"{num_train // effective_batch} optimizer steps per epoch of {effective_batch} samples")
    print(f"{sizes['controlnet_parameters']:,} trained parameters")
    print(f"{sizes['weights_gib']:.1f} GiB per device before activations")
    print(f"{sizes['checkpoint_gib']:.2f} GiB per checkpoint")


def _assemble(args: argparse.Namespace, *, index: CocoIndex, checkpoint_path: Path | None) -> Run:
    """Build the three parts of a Lightning run, and the folder that it writes to."""
    import pytorch_lightning as pl

    from data import SampleRule
    from inpainting.interop import read_controlnet_weights
    from lightning_data import InpaintingDataModule, ResumePosition
    from lightning_module import InpaintingControlNet
    from lightning_trainer import build_trainer
    from model import build_controlnet, load_base, load_controlnet_weights

    pl.seed_everything(args.seed, verbose=False)
    base = load_base(
        args.pretrained_model_name_or_path,
        base_config=args.base_config,
        prediction_type=args.prediction_type,
    )
    controlnet = build_controlnet(base.unet, stride=base.stride)
    if args.controlnet_weights:
        weights = read_controlnet_weights(args.controlnet_weights)
        load_controlnet_weights(controlnet, weights, source=args.controlnet_weights)
    position = ResumePosition()
    side = args.image_size // base.stride
    datamodule = InpaintingDataModule(
        index,
        tokenizer=base.tokenizer,
        rule=SampleRule(
            image_size=args.image_size,
            latent_shape=(base.vae.config["latent_channels"], side, side),
            num_train_timesteps=base.noise_scheduler.config["num_train_timesteps"],
            mask_types=args.mask_types,
            mask_area_range=tuple(args.mask_area_range),
            empty_prompt_prob=args.empty_prompt_prob,
            seed=args.seed,
        ),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        val_split=args.val_split,
        accumulate_grad_batches=args.accumulate_grad_batches,
        overfit_batches=args.overfit_batches,
        position=position,
    )
    record = _describe_weights(args, base=base)
    run_dir, global_step = _open_run_dir(args, record=record, checkpoint_path=checkpoint_path)
    trainer = build_trainer(
        args, run_dir=run_dir, datamodule=datamodule, position=position, purge_step=global_step
    )
    world_size = trainer.num_devices * trainer.num_nodes
    num_batches = len(datamodule.train_sampler(rank=0, world_size=world_size))
    steps_per_epoch = max(num_batches // args.accumulate_grad_batches, 1)
    module = InpaintingControlNet(
        base=base,
        controlnet=controlnet,
        num_training_steps=args.max_steps
        if args.max_steps > 0
        else args.num_epochs * steps_per_epoch,
        learning_rate=args.learning_rate,
        adam_weight_decay=args.adam_weight_decay,
        lr_scheduler=args.lr_scheduler,
        lr_warmup_steps=args.lr_warmup_steps,
        snr_gamma=args.snr_gamma,
        ema_decay=args.ema_decay,
        precision=args.precision,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    logger.info(
        "%d pictures train, %d validate; %d optimizer steps per epoch; "
        "base %s at %d px; %s on %d x %s",
        len(datamodule.train_set), len(datamodule.val_set), steps_per_epoch, base.name,
        args.image_size, args.precision, world_size, args.accelerator,
    )  # fmt: skip
    logger.info("run folder: %s", run_dir)
    return Run(args, trainer, module, datamodule, record, run_dir, checkpoint_path)


def _describe_weights(args: argparse.Namespace, *, base: Base) -> InpaintingRecord:
    """Record what somebody must know to use the weights; no local path is in it."""
    from inpainting.checkpoints import InpaintingRecord, base_hash

    is_hub_id = not Path(args.pretrained_model_name_or_path).exists()
    return InpaintingRecord(
        image_size=args.image_size,
        vae_stride=base.stride,
        prediction_type=base.prediction_type,
        base="demo" if args.uses_demo_base else base.name,
        base_unet_sha256=None if is_hub_id else base_hash(base.unet),
        is_average=args.ema_decay is not None,
        global_step=0,
    )


def _open_run_dir(
    args: argparse.Namespace, *, record: InpaintingRecord, checkpoint_path: Path | None
) -> tuple[Path, int | None]:
    """Return the run's folder, and the step from which on its curves are written anew.

    A resumed run goes on in its own folder; a checkpoint that was moved starts a new one.
    """
    if not is_first_process():
        return Path(args.output_dir) / "not_the_first_process", None
    global_step = None
    run_dir = None
    if checkpoint_path is not None:
        global_step = read_checkpoint(checkpoint_path).get("global_step")
        run_dir = run_dir_of(checkpoint_path)
        logger.info("resuming from %s at step %s", checkpoint_path, global_step)
        if run_dir is None:
            logger.info("the checkpoint isn't in a run folder: going on in a new one")
    if run_dir is None:
        run_dir = new_run_dir(Path(args.output_dir))
    handler = logging.FileHandler(run_dir / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    write_run_json(run_dir, arguments=_portable_arguments(args), record=asdict(record))
    return run_dir, None if global_step is None else global_step + 1


def _portable_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the resolved flags with local paths made absolute, for whoever finds the folder."""
    arguments = vars(args).copy()
    for name in ("image_dir", "ann_file", "caption_file", "controlnet_weights", "base_config",
                 "pretrained_model_name_or_path", "output_dir"):  # fmt: skip
        value = arguments[name]
        if value is not None and Path(value).exists():
            arguments[name] = str(Path(value).resolve())
    return arguments


def train(run: Run) -> int:
    """Fit, export, and say where the results are; returns the exit code."""
    import torch

    from lightning_checkpoints import StoppedBySignal

    if run.args.find_lr:
        return _find_lr(run)
    last_path = run.run_dir / "checkpoints" / "last.ckpt"
    resume_hint = f"to go on: --resume_from_checkpoint {shlex.quote(str(last_path))}"
    try:
        run.trainer.fit(
            run.module,
            datamodule=run.datamodule,
            ckpt_path=run.checkpoint_path,
            weights_only=True,
        )
    except StoppedBySignal as stopped:
        logger.info("stopped by %s, saved at step %d", stopped, run.trainer.global_step)
        logger.info("%s", resume_hint)
        return 128 + stopped.signum
    except torch.OutOfMemoryError:
        logger.error(
            "error: out of GPU memory. Try --gradient_checkpointing, a smaller --batch_size with "
            "--accumulate_grad_batches, or --precision bf16-mixed."
        )
        return 1
    except Exception:
        if is_first_process() and last_path.exists():
            logger.error("the run failed; %s", resume_hint)
        raise
    if run.trainer.is_global_zero:
        _export(run)
    return 0


def _find_lr(run: Run) -> int:
    """Search a learning rate, plot the curve into the run folder, and stop."""
    from pytorch_lightning.tuner import Tuner

    finder = Tuner(run.trainer).lr_find(
        run.module, datamodule=run.datamodule, update_attr=False, attr_name="learning_rate"
    )
    assert finder is not None
    figure = cast("Figure", finder.plot(suggest=True))
    figure.savefig(run.run_dir / "find_lr.png")
    suggestion = finder.suggestion()
    if suggestion is None:
        logger.info("no learning rate stands out: the curve has too few points or none falls")
    else:
        logger.info("suggested: --learning_rate %.2g", suggestion)
    logger.info("curve: %s", run.run_dir / "find_lr.png")
    return 0


def _export(run: Run) -> None:
    """Write final_model/ and say what to type next."""
    from inpainting.checkpoints import write_final_model

    args = run.args
    folder = write_final_model(
        run.run_dir / "final_model",
        controlnet=run.module.controlnet,
        state_dict=run.module.best_controlnet.state_dict(),
        record=replace(run.record, global_step=run.trainer.global_step),
        training={
            "pictures": len(run.datamodule.train_set),
            "batch size": args.batch_size * args.accumulate_grad_batches * run.trainer.world_size,
            "learning rate": args.learning_rate,
            "holes": ", ".join(f"{name} {share:.0%}" for name, share in args.mask_types.items()),
            "precision": args.precision,
        },
    )
    weights = shlex.quote(str(folder / "controlnet.pth"))
    logger.info("done: %d steps; results: %s", run.trainer.global_step, run.run_dir)
    logger.info("watch: tensorboard --logdir %s", shlex.quote(args.output_dir))
    logger.info(
        "fill a hole: python infer.py --checkpoint_path %s --input_image test.jpg "
        "--input_mask mask.png",
        weights,
    )


if __name__ == "__main__":
    sys.exit(main())
