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
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from inpainting.flags import DEFAULT_BASE, build_parser
from inpainting.mask_flags import check_area_range
from inpainting.preflight import check_flags, check_image_size, resolve_device
from inpainting.quiet import quiet_libraries
from inpainting.runs import (
    STOP_SIGNALS,
    cache_dir,
    check_strategy_can_read,
    find_checkpoint,
    is_first_process,
    lock_run_dir,
    run_dir_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from inpainting.base import BaseConfig
    from lightning_run import Run

logger = logging.getLogger("train_lightning")

CHECKPOINT_VARIABLE = "INPAINTING_CHECKPOINT"  # what Lightning's own processes inherit
# What a user can cause: one line and exit code 2.
USER_ERRORS = (
    ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError,
    BlockingIOError,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logger.setLevel(logging.INFO if is_first_process() else logging.WARNING)
    _end_at_once_on_a_signal()
    try:
        if args.check:
            return check(args)
        run = prepare(args)
        if run is None:
            return 0
        from lightning_faults import end_workers

        try:
            return train(run)
        finally:
            _end_at_once_on_a_signal()  # Lightning has put back what it found
            end_workers()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _end_at_once_on_a_signal() -> None:
    """Answer signals while training hasn't got its own handlers (StopOnSignal).

    By a thread: the main one may wait in C++ for another rank, where no Python handler runs, until
    Lightning sees that rank gone and kills this one with SIGKILL. And not by an exception, which
    would be swallowed within an import.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # as set_wakeup_fd demands
    signal.set_wakeup_fd(write_end)
    for signum in STOP_SIGNALS:
        signal.signal(signum, lambda *_: None)  # only signals with a handler are written there
    threading.Thread(target=_end_on, args=(read_end,), daemon=True).start()


def _end_on(read_end: int) -> None:
    """Wait for one of these signals; the loaders' workers send SIGCHLD when they end."""
    while (signum := os.read(read_end, 1)[0]) not in STOP_SIGNALS:
        pass
    os._exit(128 + signum)


class UserError(Exception):
    """Something that the user can put right: shown in one line."""


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Turn what a user can cause into a UserError."""
    try:
        yield
    except USER_ERRORS as error:
        raise UserError(" ".join(str(error).split())) from error


def prepare(args: argparse.Namespace) -> Run | None:
    """Check and build everything before training; None where there is nothing to train.

    Raises:
        UserError: whatever is wrong, in one line.
    """
    with _told_in_one_line():
        _check_flags(args)
        return _build(args)


def _check_flags(args: argparse.Namespace) -> None:
    for line in check_flags(args):
        logger.warning("warning: %s", line)
    check_area_range(*args.mask_area_range)


def check(args: argparse.Namespace) -> int:
    """Do what --check asks for; returns the exit code.

    Raises:
        UserError: the files can't be what the flags say.
    """
    with _told_in_one_line():
        _check_flags(args)
        _name_the_data(args)
        from data_check import check_data

        return check_data(args)


def _build(args: argparse.Namespace) -> Run | None:
    checkpoint_path = _find_checkpoint(args) if args.resume_from_checkpoint else None
    _name_the_data(args)
    _quiet_lightning()
    quiet_libraries()
    from inpainting.base import read_base_config
    from inpainting.devices import keep_freed_memory
    from inpainting.inspection import open_training_data
    from model import check_prediction_type

    config = read_base_config(args.pretrained_model_name_or_path, base_config=args.base_config)
    check_prediction_type(config, args.prediction_type)
    if args.prediction_type == "auto":
        args.prediction_type = config.prediction_type
    if args.image_size is None:
        args.image_size = config.image_size
    if args.monitor is None:
        args.monitor = "val/loss" if args.val_split > 0 else "train_loss"
    check_image_size(args.image_size, config=config)
    resolve_device(args)
    keep_freed_memory(args.accelerator)
    if checkpoint_path is not None:
        check_strategy_can_read(checkpoint_path, strategy=args.strategy)
        run_dir = run_dir_of(checkpoint_path)
        if run_dir is not None and is_first_process() and not args.dry_run:
            lock_run_dir(run_dir)
    index, unreadable_rows = open_training_data(args)
    if args.dry_run:
        _print_dry_run(args, config=config, num_images=len(index))
        return None
    from lightning_run import assemble

    return assemble(
        args, index=index, unreadable_rows=unreadable_rows, checkpoint_path=checkpoint_path
    )


def _find_checkpoint(args: argparse.Namespace) -> Path:
    """Resolve --resume_from_checkpoint once for all processes that Lightning starts.

    It starts them minutes later: by then `last` may be another run's.
    """
    if not is_first_process() and CHECKPOINT_VARIABLE in os.environ:
        return Path(os.environ[CHECKPOINT_VARIABLE])
    path = find_checkpoint(args.resume_from_checkpoint, output_dir=Path(args.output_dir))
    os.environ[CHECKPOINT_VARIABLE] = str(path.absolute())
    return path


def _name_the_data(args: argparse.Namespace) -> None:
    """Without --image_dir: the demo's scenes, and, unless one is named, the demo's base."""
    args.uses_demo_base = False
    if args.image_dir is None:
        from demo.defaults import BASE_DIR, prepare_scenes

        logger.info("no --image_dir: training on the demo's drawn scenes")
        scenes = prepare_scenes(cache_dir() / "demo")
        args.image_dir, args.ann_file, args.caption_file = map(
            str, (scenes.image_dir, scenes.ann_file, scenes.caption_file)
        )
        if args.pretrained_model_name_or_path is None:
            logger.info("no --pretrained_model_name_or_path: with the demo's small base")
            args.pretrained_model_name_or_path = str(BASE_DIR)
            args.uses_demo_base = True
    if args.pretrained_model_name_or_path is None:
        args.pretrained_model_name_or_path = DEFAULT_BASE


def _quiet_lightning() -> None:
    """Silence what Lightning and DeepSpeed say about themselves; our own lines remain."""
    os.environ.setdefault("DS_ACCELERATOR_LOG_LEVEL", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric)\b")
    import pytorch_lightning  # noqa: F401 - sets its loggers' levels when it is imported

    for name in ("pytorch_lightning", "lightning_fabric", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _print_dry_run(args: argparse.Namespace, *, config: BaseConfig, num_images: int) -> None:
    from lightning_trainer import least_world_size
    from model import estimate_sizes

    sizes = estimate_sizes(
        config,
        precision=args.precision,
        has_average=bool(args.ema_decay),
        use_8bit_adam=args.use_8bit_adam,
    )
    for name, value in sorted(vars(args).items()):
        print(f"{name:32} {value}")
    effective_batch = args.batch_size * least_world_size(args) * args.accumulate_grad_batches
    num_train = round(num_images * (1 - args.val_split))
    num_views = 2 * num_train * args.num_crops + num_images - num_train
    print(f"\n{num_images} pictures, about {num_train} of them train")
    print(f"{num_train // effective_batch} optimizer steps per epoch of {effective_batch} samples")
    print(f"{sizes['controlnet_parameters']:,} trained parameters")
    print(f"{sizes['weights_gib']:.1f} GiB per device before activations")
    print(f"{sizes['checkpoint_gib']:.2f} GiB per checkpoint")
    if args.cache_latents != "off":
        latents = config.vae["latent_channels"] * (args.image_size // config.stride) ** 2
        print(f"{num_views * 4 * latents / 1e9:.2f} GB of cached latents")


def train(run: Run) -> int:
    """Fit, export, and say where the results are; returns the exit code."""
    from inpainting.unreadable import UnreadablePictureError
    from lightning_checkpoints import StoppedBySignal
    from lightning_faults import OtherStartError, end_others, leave_lost_workers_to_the_loader

    leave_lost_workers_to_the_loader()
    try:
        if run.args.find_lr:
            return _find_lr(run)
        run.trainer.fit(
            run.module,
            datamodule=run.datamodule,
            ckpt_path=run.checkpoint_path,
            weights_only=True,
        )
        _end_at_once_on_a_signal()  # while the results are written
        weights = run.module.whole_weights()
        if run.trainer.is_global_zero:
            _export(run, weights=weights)
    except StoppedBySignal as stopped:
        logger.info("stopped by %s, saved at step %d", stopped, stopped.step)
        logger.info("to go on: %s", _resume_flag(run))
        # Lightning's launcher kills the first process as soon as another one's code isn't 0.
        return 128 + stopped.signum if run.trainer.local_rank == 0 else 0
    except (UnreadablePictureError, OtherStartError) as error:
        logger.error("error: %s", error)
        end_others(run.trainer)
        return 2
    except Exception as error:
        return _fail(run, error)
    return 0


def _fail(run: Run, error: Exception) -> int:
    """Say what happened and what to type next; a fault of ours keeps its traceback."""
    from lightning_faults import PATIENCE_S, end_others, explain, is_lost_process

    if is_lost_process(error):
        time.sleep(PATIENCE_S)  # the process that is gone says why, or whoever watches it
    what = explain(error, run_dir=run.run_dir)
    if what is None:
        logger.error("%s", traceback.format_exc().strip())
        what = "the run failed, by a fault of the trainer (see above)"
    logger.error("error: %s. To go on: %s", what, _resume_flag(run))
    end_others(run.trainer)
    return 1


def _resume_flag(run: Run) -> str:
    """Return the flag that goes on with this run, as it is typed."""
    last_path = run.run_dir / "checkpoints" / "last.ckpt"
    if not is_first_process():
        return "--resume_from_checkpoint last"
    if not last_path.exists():
        return "the same command again: nothing was saved yet"
    return f"--resume_from_checkpoint {shlex.quote(str(last_path))}"


def _find_lr(run: Run) -> int:
    """Search a learning rate, plot the curve into the run folder, and stop."""
    from pytorch_lightning.tuner import Tuner

    finder = Tuner(run.trainer).lr_find(
        run.module, datamodule=run.datamodule, update_attr=False, attr_name="learning_rate"
    )
    assert finder is not None
    if not run.trainer.is_global_zero:
        return 0
    figure = cast("Figure", finder.plot(suggest=True))
    figure.savefig(run.run_dir / "find_lr.png")
    suggestion = finder.suggestion()
    if suggestion is None:
        logger.info("no learning rate stands out: the curve has too few points or none falls")
    else:
        logger.info("suggested: --learning_rate %.2g", suggestion)
    logger.info("curve: %s", run.run_dir / "find_lr.png")
    return 0


def _export(run: Run, *, weights: dict[str, Tensor]) -> None:
    """Write final_model/ and say what to type next."""
    from inpainting.checkpoints import write_final_model

    args = run.args
    folder = write_final_model(
        run.run_dir / "final_model",
        controlnet=run.module.controlnet,
        state_dict=weights,
        record=replace(run.record, global_step=run.trainer.global_step),
        training={
            "pictures": len(run.datamodule.train_set),
            "batch size": args.batch_size * args.accumulate_grad_batches * run.trainer.world_size,
            "learning rate": args.learning_rate,
            "holes": ", ".join(f"{name} {share:.0%}" for name, share in args.mask_types.items()),
            "precision": args.precision,
        },
    )
    weights_path = shlex.quote(str(folder / "controlnet.pth"))
    logger.info("done: %d steps; results: %s", run.trainer.global_step, run.run_dir)
    logger.info("watch: tensorboard --logdir %s", shlex.quote(args.output_dir))
    logger.info(
        "fill a hole: python infer.py --checkpoint_path %s --input_image test.jpg "
        "--input_mask mask.png",
        weights_path,
    )


if __name__ == "__main__":
    sys.exit(main())
