"""The DataModule: which pictures train, which validate, in what order, and from where on.

The order of an epoch depends on (seed, epoch) alone, and the position in it is kept as the number
of samples that all ranks together have consumed: a resume goes on with the very next sample, with
another batch size or number of devices too.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import signal
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import CLIPTokenizer

from data import CocoInpaintingDataset, Sample, SampleRule
from inpainting.coco import CocoIndex
from inpainting.latents import MomentsCache
from inpainting.randomness import generator
from inpainting.runs import STOP_SIGNALS
from inpainting.unreadable import UnreadablePictures

logger = logging.getLogger(__name__)

Address = tuple[int, int]


def split_rows(image_ids: np.ndarray, *, val_split: float) -> tuple[np.ndarray, np.ndarray]:
    """Split pictures by their ids alone: the same picture is on the same side in every run.

    Pictures are ranked by a hash of their id, and the lowest share of them validates.

    Args:
        image_ids: (N,) int64, distinct.
        val_split: share that validates, in [0, 1); above 0 at least one picture does.

    Returns:
        rows that train and rows that validate, each ascending int64.
    """
    num_val = round(len(image_ids) * val_split)
    if val_split > 0:
        num_val = min(max(num_val, 1), len(image_ids) - 1)
    hashes = [hashlib.sha256(str(int(image_id)).encode()).digest() for image_id in image_ids]
    ranked = np.array(sorted(range(len(image_ids)), key=hashes.__getitem__), dtype=np.int64)
    return np.sort(ranked[num_val:]), np.sort(ranked[:num_val])


class EpochBatchSampler(Sampler[list[Address]]):
    """One rank's batches of one epoch, as lists of (epoch, position) addresses.

    All ranks walk through one permutation together: a step of all of them takes the next
    `batch_size * world_size` samples, rank r the r-th block. The epoch is cut to whole effective
    batches, so each optimizer step has all of its samples.

    Args:
        num_samples: pictures in the split.
        batch_size: samples per rank and micro-batch.
        rank, world_size: this process among all.
        accumulate_grad_batches: micro-batches per optimizer step.
        seed: the run's seed.

    Raises:
        ValueError: there are fewer samples than one effective batch.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        batch_size: int,
        rank: int,
        world_size: int,
        accumulate_grad_batches: int,
        seed: int,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.seed = seed
        self.samples_per_batch = batch_size * world_size
        effective_batch = self.samples_per_batch * accumulate_grad_batches
        if num_samples < effective_batch:
            raise ValueError(
                f"the training split must hold at least one effective batch ({effective_batch} = "
                f"batch_size x devices x accumulate_grad_batches), got {num_samples} pictures. "
                "Lower --batch_size or --accumulate_grad_batches, or add pictures."
            )
        self.epoch_size = num_samples // effective_batch * effective_batch
        self.epoch = 0
        self.num_consumed = 0

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever this one started."""
        return self.epoch_size // self.samples_per_batch

    @property
    def num_remaining(self) -> int:
        """Batches that are left when `num_consumed` samples of the epoch are done."""
        return max(self.epoch_size - self.num_consumed, 0) // self.samples_per_batch

    def __iter__(self) -> Iterator[list[Address]]:
        order = generator(self.seed, "order", self.epoch).permutation(self.num_samples)
        for batch in range(self.num_remaining):
            start = self.num_consumed + batch * self.samples_per_batch + self.rank * self.batch_size
            yield [(self.epoch, int(p)) for p in order[start : start + self.batch_size]]


class FixedBatchSampler(Sampler[list[Address]]):
    """One rank's validation batches: every picture in order, the same at each epoch.

    The last rounds wrap around, so that all ranks run equally many full batches (collectives in
    ZeRO-3's forward would hang otherwise); val/loss counts each picture once.
    """

    def __init__(self, *, num_samples: int, batch_size: int, rank: int, world_size: int) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.samples_per_batch = batch_size * world_size

    def __len__(self) -> int:
        return -(-self.num_samples // self.samples_per_batch)

    def __iter__(self) -> Iterator[list[Address]]:
        for batch in range(len(self)):
            start = batch * self.samples_per_batch + self.rank * self.batch_size
            yield [(0, p % self.num_samples) for p in range(start, start + self.batch_size)]


class EpochLoader(DataLoader[Sample]):
    """A DataLoader that looks up epoch and position when the first batch is asked for.

    Lightning asks for the iterator before it knows them.
    """

    trainer: pl.Trainer
    position: ResumePosition

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.batch_sampler
        assert isinstance(sampler, EpochBatchSampler)
        sampler.epoch = self.trainer.current_epoch
        sampler.num_consumed = self.position.num_consumed
        yield from super().__iter__()


def _leave_signals_to_the_run(worker_id: int) -> None:
    """Let a worker outlive a signal that asks the run to stop, and reaches the whole process group.

    The run still needs its samples to end the step and save; its workers end with it.
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class ResumePosition(pl.Callback):
    """Knows how many samples of the epoch all ranks together have consumed, and restores it.

    Lightning counts batches, which mean something else after a change of batch size or devices:
    its counter is set so that exactly the remaining batches of the epoch are run.
    """

    def __init__(self) -> None:
        self.num_consumed = 0
        self._epoch = 0
        self._restored_epoch: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Translate the restored number of samples into Lightning's count of batches."""
        loop = trainer.fit_loop.epoch_loop
        sampler = self._sampler(trainer)
        is_mid_epoch = self._restored_epoch == trainer.current_epoch and self.num_consumed > 0
        if not is_mid_epoch:
            self.num_consumed = 0
            return
        sampler.num_consumed = self.num_consumed
        done = len(sampler) - sampler.num_remaining
        # The checkpoint was written within on_train_batch_end: that batch isn't "completed" yet,
        # and Lightning completes it when it restarts.
        progress = loop.batch_progress.current
        progress.completed = done - 1 if loop.restarted_on_train_batch_end else done
        progress.ready = progress.started = progress.processed = done  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
    ) -> None:
        """Count the samples that this step took on all ranks."""
        self._epoch = trainer.current_epoch
        self.num_consumed += self._sampler(trainer).samples_per_batch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the next epoch at its first sample."""
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.num_consumed = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"epoch": self._epoch, "num_consumed": self.num_consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's position."""
        self._restored_epoch = state_dict["epoch"]
        self.num_consumed = state_dict["num_consumed"]

    @staticmethod
    def _sampler(trainer: pl.Trainer) -> EpochBatchSampler:
        loader = trainer.train_dataloader
        assert isinstance(loader, EpochLoader)
        assert isinstance(loader.batch_sampler, EpochBatchSampler)
        return loader.batch_sampler


class CountUnreadable(pl.Callback):
    """Tells each epoch's end how many pictures were left out, if they have become more.

    What one rank has found the others know from then on: no picture is named twice.
    """

    def __init__(self, unreadable: UnreadablePictures) -> None:
        self.unreadable = unreadable
        self._num_told = 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Join what the ranks have found, and tell its number."""
        flags = self.unreadable.flags
        found = flags.to(trainer.strategy.root_device, torch.int32)
        found = trainer.strategy.reduce(found, reduce_op="sum")
        assert isinstance(found, torch.Tensor)
        flags.copy_(found > 0)
        count = int(flags.sum())
        if count > self._num_told and trainer.is_global_zero:
            logger.warning(
                "warning: %d of %d pictures can't be read: each one's neighbour takes its place",
                count, len(flags),
            )  # fmt: skip
        self._num_told = count


class InpaintingDataModule(pl.LightningDataModule):
    """Training and validation loaders over one CocoIndex.

    Args:
        index: the COCO records.
        tokenizer: the base's.
        rule: what a sample looks like.
        batch_size: samples per device and micro-batch.
        num_workers: loader processes per device; 0 loads in the training process.
        val_split: share of the pictures that validates.
        accumulate_grad_batches: micro-batches per optimizer step.
        overfit_batches: train (and validate) on this many batches only; 0 = on all.
        position: where in the epoch the run is.
        moments_cache: where the VAE's moments are kept, or None.
        unreadable: the pictures that are left out.
    """

    def __init__(
        self,
        index: CocoIndex,
        *,
        tokenizer: CLIPTokenizer,
        rule: SampleRule,
        batch_size: int,
        num_workers: int,
        val_split: float,
        accumulate_grad_batches: int,
        overfit_batches: int,
        position: ResumePosition,
        moments_cache: MomentsCache | None,
        unreadable: UnreadablePictures,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.accumulate_grad_batches = accumulate_grad_batches
        self.position = position
        self.unreadable = unreadable
        self.seed = rule.seed
        train_rows, val_rows = split_rows(index.image_ids, val_split=val_split)
        if overfit_batches:
            order = generator(rule.seed, "overfit").permutation(train_rows)
            train_rows = np.sort(order[: overfit_batches * batch_size])
            val_rows = train_rows if val_split > 0 else val_rows
        self.train_set = CocoInpaintingDataset(
            index, rows=train_rows, tokenizer=tokenizer, rule=rule, is_training=True,
            moments_cache=moments_cache, unreadable=unreadable,
        )  # fmt: skip
        self.val_set = CocoInpaintingDataset(
            index, rows=val_rows, tokenizer=tokenizer, rule=rule, is_training=False,
            moments_cache=moments_cache, unreadable=unreadable,
        )  # fmt: skip

    def train_sampler(self, *, rank: int, world_size: int) -> EpochBatchSampler:
        """Return the order of the training pictures for one rank."""
        return EpochBatchSampler(
            num_samples=len(self.train_set),
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            accumulate_grad_batches=self.accumulate_grad_batches,
            seed=self.seed,
        )

    def train_dataloader(self) -> EpochLoader:
        """Return the loader of one rank's training batches."""
        trainer = self._trainer()
        loader = EpochLoader(
            self.train_set,
            batch_sampler=self.train_sampler(
                rank=trainer.global_rank, world_size=trainer.world_size
            ),
            num_workers=self.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_signals_to_the_run,
            multiprocessing_context=self._worker_context(),
        )
        loader.trainer, loader.position = trainer, self.position
        return loader

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Return the loader of one rank's validation batches; none without a split."""
        if not len(self.val_set):
            return []
        trainer = self._trainer()
        return DataLoader(
            self.val_set,
            batch_sampler=FixedBatchSampler(
                num_samples=len(self.val_set),
                batch_size=min(self.batch_size, len(self.val_set)),
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            ),
            num_workers=self.num_workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_signals_to_the_run,
            multiprocessing_context=self._worker_context(),
        )

    def _worker_context(self) -> BaseContext | None:
        """Return how loader workers are started: among several ranks not by a plain fork.

        A fork copies the locks that the process group's threads hold at that moment, and hangs
        (seen with gloo: CPython's thread list). A fork server has no such threads. Signals that
        reach the whole process group must not end it either.
        """
        if self._trainer().world_size == 1 or self.num_workers == 0:
            return None
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        handlers = [signal.signal(signum, signal.SIG_IGN) for signum in STOP_SIGNALS]
        forkserver.ensure_running()
        for signum, handler in zip(STOP_SIGNALS, handlers, strict=True):
            signal.signal(signum, handler)
        return context

    def _trainer(self) -> pl.Trainer:
        assert self.trainer is not None
        return self.trainer
