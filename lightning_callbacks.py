"""What a run shows while it trains: the bar, the curves, the pictures; and the average."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from data import CocoInpaintingDataset, Sample
from inpainting.diffusion import make_conditioning
from inpainting.metrics import psnr_hole
from inpainting.sampling import inpaint, make_pipeline, make_scheduler
from lightning_module import InpaintingControlNet

logger = logging.getLogger(__name__)

NUM_PICTURES = 4
NUM_SAMPLING_STEPS = 20
GUIDANCE_SCALE = 3.0


class RunLogger(TensorBoardLogger):
    """TensorBoard alone: Lightning's logger would also leave an empty hparams.yaml."""

    @property
    def log_dir(self) -> str:
        """The run's folder as it is: Lightning's own would expand a `$HOME` in its name."""
        return self.save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """Begin a new events file where somebody deleted the old one: writing to it would fail."""
        if self._experiment is not None and not any(Path(self.log_dir).glob("events.*")):
            self._experiment = None
        return super().experiment

    def save(self) -> None:
        """Flush what was logged."""
        self.experiment.flush()


class ProgressBar(TQDMProgressBar):
    """`Epoch 5: 100%|###| 29500/29500 [2:15:30<00:00, loss=0.0987, lr=9.5e-06, v_num=0]`.

    Drawn at an epoch's end and at most five times a second: drawing costs more than the rest of
    Lightning's step. On a GPU the loss is that of the last log point: reading it in between, or
    `self.log(prog_bar=True)`, would make the GPU wait.
    """

    SHORTEST_S = 0.2

    def __init__(self) -> None:
        super().__init__()
        self.loss: float | None = None
        self._step: int | None = None  # whose loss it is
        self._drawn_at = -math.inf

    def _should_update(self, current: int, total: int | float) -> bool:
        now = time.monotonic()
        is_due = current == total or now - self._drawn_at >= self.SHORTEST_S
        if is_due:
            self._drawn_at = now
        return self.is_enabled and is_due

    @property
    def train_description(self) -> str:
        """The bar's name from its first drawing on."""
        return f"Epoch {self.trainer.current_epoch}"

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Name the epoch here too: Lightning doesn't begin one anew that it resumes inside."""
        super().on_train_start(trainer, *_)
        self.on_train_epoch_start(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Sample,
        batch_idx: int,
    ) -> None:
        """Read the loss where that costs nothing, once in a step, and draw."""
        loss, step = outputs["loss"], trainer.global_step
        is_log_point = step % trainer.log_every_n_steps == 0 and step != self._step  # type: ignore[attr-defined]
        if loss.device.type == "cpu" or is_log_point or self.loss is None:
            self._step = step
            self.loss = loss.item() * trainer.accumulate_grad_batches
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands at the end of the bar."""
        loss = {} if self.loss is None else {"loss": f"{self.loss:.4f}"}
        learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        return {**loss, "lr": f"{learning_rate:.3g}", "v_num": 0}

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End the bar's line: what is said next gets one of its own."""
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()


class AverageWeights(pl.Callback):
    """Moves the average of the ControlNet's parameters after each optimizer step."""

    def __init__(self) -> None:
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember where the run stands."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
    ) -> None:
        """Update once per optimizer step, whoever accumulates the gradients."""
        assert isinstance(pl_module, InpaintingControlNet)
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            pl_module.judge_deepspeeds_step()
            pl_module.update_average(num_steps=self._step)


class Curves(pl.Callback):
    """Writes train/loss, train/lr, train/grad_norm and train/samples_per_second, and all of val/.

    train/loss is the mean since the last point: a single step's says little, since its timesteps
    decide most of it. The speed leaves out validation and what follows it.

    Args:
        every_n_steps: optimizer steps between two points.
    """

    def __init__(self, *, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._step = 0
        self._learning_rate = 0.0
        self._num_batches = 0
        self._elapsed_s = 0.0
        self._running_since: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember where the run stands."""
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
    ) -> None:
        """Keep the learning rate that this step takes: the schedule moves on before it ends."""
        self._learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
        if self._running_since is None:
            self._running_since = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
    ) -> None:
        """Write a point every N optimizer steps: the only place that waits for the GPU.

        And one at the end of the epoch and of the run, which may be shorter.
        """
        assert isinstance(pl_module, InpaintingControlNet)
        self._num_batches += 1
        step = trainer.global_step
        is_due = step % self.every_n_steps == 0 or trainer.is_last_batch
        if step == self._step or not (is_due or step == trainer.max_steps):
            return
        self._step = step
        values = {
            "train/loss": pl_module.mean_loss(epoch=False),
            "train/lr": self._learning_rate,
        }
        if pl_module.grad_norm is not None:
            values["train/grad_norm"] = pl_module.grad_norm
        values = {name: float(value) for name, value in values.items()}
        self._stop_clock()
        sampler = trainer.train_dataloader.batch_sampler  # type: ignore[union-attr]
        num_samples = self._num_batches * sampler.samples_per_batch
        values["train/samples_per_second"] = num_samples / self._elapsed_s
        self._elapsed_s, self._num_batches = 0.0, 0
        self._running_since = time.monotonic()
        trainer.logger.log_metrics(values, step)  # type: ignore[union-attr]
        num_left_out = pl_module.finite_steps.check()
        if num_left_out and trainer.is_global_zero:
            logger.warning(
                "warning: %d of the steps up to %d had a NaN or infinite loss or gradient and were "
                "left out", num_left_out, step,
            )  # fmt: skip

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock until the next training batch."""
        self._stop_clock()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what this validation found."""
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            values = {name: float(value) for name, value in metrics if name.startswith("val/")}
            trainer.logger.log_metrics(values, trainer.global_step)  # type: ignore[union-attr]

    def _stop_clock(self) -> None:
        if self._running_since is not None:
            self._elapsed_s += time.monotonic() - self._running_since
        self._running_since = None


def _add_images(trainer: pl.Trainer, tag: str, images: Tensor) -> None:
    """Write (N, 3, H, W) uint8 pictures side by side."""
    assert isinstance(trainer.logger, TensorBoardLogger)
    trainer.logger.experiment.add_images(tag, images.cpu(), trainer.global_step)


class TrainingPictures(pl.Callback):
    """Every N optimizer steps: the batch's originals, their holes, and what the ControlNet sees."""

    def __init__(self, *, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._step = -1

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Sample,
        batch_idx: int,
    ) -> None:
        """Write train/original, train/masked and train/mask; the hole is grey in `masked`."""
        step = trainer.global_step
        is_due = step == 1 or step % self.every_n_steps == 0
        if step == self._step or not is_due or not trainer.is_global_zero:
            return
        self._step = step
        image, mask = batch["image"][:NUM_PICTURES], batch["mask"][:NUM_PICTURES]
        masked = make_conditioning(image, mask)
        masked = torch.where(masked < 0, 0.5, masked)
        _add_images(trainer, "train/original", image)
        _add_images(trainer, "train/masked", (masked * 255).round().to(torch.uint8))
        _add_images(trainer, "train/mask", (mask * 255).expand(-1, 3, -1, -1))


class ValidationInpaintings(pl.Callback):
    """At each validation: a few fixed pictures, really inpainted.

    The pipeline borrows the networks that train; nothing is loaded twice. Each rank draws its part
    of the pictures, as many as the others do: ZeRO-3 gathers parameters within forward.

    Samples at the validation epoch's end: later no metric may be logged any more, and whatever
    acts on one (curves, checkpoints) comes later.

    Args:
        dataset: the validation split; its first pictures are used.
    """

    def __init__(self, dataset: CocoInpaintingDataset) -> None:
        self.dataset = dataset

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log val/psnr_hole and write the pictures; NaN and none where the networks overflowed."""
        if trainer.sanity_checking:
            return
        assert isinstance(pl_module, InpaintingControlNet)
        drawn = [self.dataset[0, i] for i in range(min(NUM_PICTURES, len(self.dataset)))]
        # An unreadable picture's place is taken by its neighbour, which may be there already.
        samples = list({int(sample["image_id"]): sample for sample in drawn}.values())
        fills, psnr = self._draw_fills(trainer, pl_module, samples), math.nan
        if fills:
            psnr = sum(map(_psnr_hole, fills, samples)) / len(samples)
        pl_module.log("val/psnr_hole", psnr, logger=False)
        if fills and trainer.is_global_zero:
            _show_inpaintings(trainer, samples, fills)

    def _draw_fills(
        self, trainer: pl.Trainer, module: InpaintingControlNet, samples: list[Sample]
    ) -> list[np.ndarray]:
        """Fill all samples' holes, with the other ranks; none where one has overflowed."""
        world_size = trainer.world_size
        num_mine = math.ceil(len(samples) / world_size)
        size = samples[0]["image"].shape[-1]
        fills = torch.zeros(num_mine, size, size, 3, dtype=torch.uint8, device=module.device)
        has_overflowed = torch.zeros(1, device=module.device)
        for turn in range(num_mine):
            sample = samples[(turn * world_size + trainer.global_rank) % len(samples)]
            try:
                fills[turn] = torch.from_numpy(_inpaint(module, sample))
            except FloatingPointError as error:  # a picture is no reason to end days of training
                logger.warning("no validation pictures: %s", error)
                has_overflowed += 1
        if module.gather(has_overflowed).sum() > 0:
            return []
        by_turn = module.gather(fills).reshape(world_size, *fills.shape).transpose(0, 1)
        return list(by_turn.flatten(0, 1)[: len(samples)].cpu().numpy())


def _psnr_hole(fill: np.ndarray, sample: Sample) -> float:
    truth, mask = sample["image"].permute(1, 2, 0).numpy(), sample["mask"][0].numpy()
    return psnr_hole(fill, truth=truth, mask=mask)


def _show_inpaintings(trainer: pl.Trainer, samples: list[Sample], fills: list[np.ndarray]) -> None:
    """Write val/original, val/masked and val/inpainted, with the prompt beside them."""
    image = torch.stack([sample["image"] for sample in samples])
    mask = torch.stack([sample["mask"] for sample in samples])
    _add_images(trainer, "val/original", image)
    _add_images(trainer, "val/masked", torch.where(mask.bool(), 128, image).to(torch.uint8))
    inpainted = torch.stack([torch.from_numpy(fill) for fill in fills])
    _add_images(trainer, "val/inpainted", inpainted.permute(0, 3, 1, 2))
    trainer.logger.experiment.add_text(  # type: ignore[union-attr]
        "val/prompts", "\n\n".join(s["prompt"] or "(empty)" for s in samples),
        trainer.global_step,
    )  # fmt: skip


def _inpaint(module: InpaintingControlNet, sample: Sample) -> np.ndarray:
    """Fill a sample's hole with the networks in memory, (H, W, 3) uint8."""
    base = module.base
    base.move_vae(module.device)
    pipeline = make_pipeline(
        vae=base.vae,
        unet=base.unet,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        controlnet=module.best_controlnet,
        scheduler=make_scheduler("unipc", base.noise_scheduler),
    )
    (result,) = inpaint(
        pipeline,
        image=sample["image"].permute(1, 2, 0).numpy(),
        mask=sample["mask"][0].numpy(),
        prompt=sample["prompt"],
        negative_prompt="",
        seeds=[int(sample["image_id"]) % 2**31],
        num_inference_steps=NUM_SAMPLING_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        conditioning_scale=1.0,
        strength=1.0,
        image_size=sample["image"].shape[-1],
        crop_to_mask=False,
        mask_blur=0,
    )
    return result
