"""The objective: a ControlNet learns to steer a frozen Stable Diffusion into filling holes."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from diffusers.optimization import get_scheduler
from pytorch_lightning.strategies import DeepSpeedStrategy, Strategy
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from data import Sample
from inpainting.compiling import compile_step
from inpainting.diffusion import (
    make_conditioning,
    min_snr_weights,
    normalize_image,
    prediction_target,
)
from inpainting.finite import FiniteSteps
from inpainting.latents import NO_SLOT, MomentsCache, Slot
from inpainting.optimizers import build_adamw, moved_step, set_rates
from inpainting.validation import losses_by_place, summarize_losses
from model import Base, predict_noise

# What the frozen networks are kept in: autocast would cast them anew in every step. fp16 overflows
# in Stable Diffusion's VAE; everywhere else the frozen weights survive the rounding.
FROZEN_DTYPES = {
    "32": (torch.float32, torch.float32),
    "bf16-mixed": (torch.bfloat16, torch.bfloat16),
    "16-mixed": (torch.float16, torch.float32),
}


class InpaintingControlNet(pl.LightningModule):
    """Trains the ControlNet alone; the frozen base stays outside the module's registration.

    So checkpoints, DDP, DeepSpeed and the optimizer see nothing but the ControlNet.

    Args:
        base: the frozen Stable Diffusion.
        controlnet: what is trained, fp32.
        num_training_steps: optimizer steps of the whole run, for the learning-rate schedule.
        learning_rate: peak learning rate of AdamW.
        adam_weight_decay: AdamW's decoupled weight decay.
        lr_scheduler: diffusers' name of the schedule: "constant", "cosine", ...
        lr_warmup_steps: optimizer steps of linear warm-up.
        snr_gamma: Min-SNR cap (min_snr_weights), or None for the plain loss.
        ema_decay: decay of the average of the ControlNet's parameters, or None for no average.
        precision: "32", "bf16-mixed" or "16-mixed".
        gradient_checkpointing: recompute activations in backward, the frozen decoder's too.
        use_8bit_adam: keep Adam's moments in 8 bits (bitsandbytes).
        compile_mode: what of the networks is compiled (inpainting.compiling).
        moments_cache: what to keep missing moments in, or None: encode each batch as it comes.
    """

    def __init__(
        self,
        *,
        base: Base,
        controlnet: ControlNetModel,
        num_training_steps: int,
        learning_rate: float,
        adam_weight_decay: float,
        lr_scheduler: str,
        lr_warmup_steps: int,
        snr_gamma: float | None,
        ema_decay: float | None,
        precision: str,
        gradient_checkpointing: bool,
        use_8bit_adam: bool,
        compile_mode: str,
        moments_cache: MomentsCache | None,
    ) -> None:
        super().__init__()
        self.base = base
        self.controlnet = controlnet
        self.num_training_steps = num_training_steps
        self.learning_rate = learning_rate
        self.adam_weight_decay = adam_weight_decay
        self.lr_scheduler = lr_scheduler
        self.lr_warmup_steps = lr_warmup_steps
        self.snr_gamma = snr_gamma
        self.ema_decay = ema_decay
        self.precision = precision
        self.use_8bit_adam = use_8bit_adam
        self.moments_cache = moments_cache
        if gradient_checkpointing:
            controlnet.enable_gradient_checkpointing()
            base.unet.enable_gradient_checkpointing()
        # Unregistered: DeepSpeed would cast a registered copy to 16 bits, and DDP watch it.
        average = copy.deepcopy(controlnet).requires_grad_(False).eval() if ema_decay else None
        object.__setattr__(self, "average", average)
        self.average: ControlNetModel | None
        self._predict_noise = compile_step(predict_noise, controlnet, base.unet, mode=compile_mode)
        self._grad_norm: Tensor | None = None
        self._whole_weights: dict[str, Tensor] | None = None
        self.loss_sums = torch.zeros(4, dtype=torch.float64)
        self.finite_steps = FiniteSteps(has_loss_scaler=precision == "16-mixed")
        self._is_resumed = False
        self._steps_per_epoch = self._earlier_steps_per_epoch = 0
        self._num_steps = self._num_skipped = 0
        self._validation_losses: list[dict[str, Tensor]] = []
        self._base_losses: dict[int, float] = {}

    @property
    def best_controlnet(self) -> ControlNetModel:
        """What validation, samples and the export use: the average where there is one."""
        return self.controlnet if self.average is None else self.average

    @property
    def grad_norm(self) -> Tensor | float | None:
        """The last step's global gradient norm before clipping; DeepSpeed clips by itself."""
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            return strategy.deepspeed_engine.get_global_grad_norm()
        return self._grad_norm

    def whole_weights(self) -> dict[str, Tensor]:
        """Return best_controlnet's weights, fp32 on CPU. Every rank must call it.

        DeepSpeed spreads the fp32 weights over the ranks; the module has their 16-bit copies, and
        under ZeRO-3 state_dict() gives empty tensors.
        """
        if self._whole_weights is not None:
            return self._whole_weights
        weights: dict[str, Tensor] = self.best_controlnet.state_dict()
        if self.average is None and isinstance(self.trainer.strategy, DeepSpeedStrategy):
            from deepspeed.utils import safe_get_full_fp32_param

            for name, parameter in self.controlnet.named_parameters():
                weights[name] = cast(Tensor, safe_get_full_fp32_param(parameter)).cpu()
        return weights

    def on_train_end(self) -> None:
        """Collect DeepSpeed's weights while they are still on their devices."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self._whole_weights = self.whole_weights()

    def on_fit_start(self) -> None:
        """Move what Lightning doesn't know of to the device."""
        dtype, vae_dtype = FROZEN_DTYPES[self.precision]
        self.base.to(self.device, dtype=dtype, vae_dtype=vae_dtype)
        if self.average is not None:
            self.average.to(device=self.device)  # type: ignore[call-arg]
        accumulator = torch.float32 if self.device.type == "mps" else torch.float64
        self.loss_sums = self.loss_sums.to(self.device, dtype=accumulator)
        self.finite_steps.to(self.device)

    def on_train_start(self) -> None:
        """Train without the VAE, after the sanity check; let a resumed run's own flags rule."""
        self._put_vae_away()
        self._num_steps, self._num_skipped = self.trainer.global_step, self._count_skipped()
        num_batches = cast(int, self.trainer.num_training_batches)
        self._steps_per_epoch = math.ceil(num_batches / self.trainer.accumulate_grad_batches)
        if not self._is_resumed:
            return
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        schedule = cast(LambdaLR, config.scheduler)
        steps, earlier = self._steps_per_epoch, self._earlier_steps_per_epoch
        is_counted_in_epochs = self.num_training_steps == self.trainer.max_epochs * steps  # type: ignore[operator]
        if earlier and is_counted_in_epochs:
            schedule.last_epoch = moved_step(
                schedule.last_epoch,
                steps_per_epoch=steps,
                earlier_steps_per_epoch=earlier,
                num_warmup_steps=self.lr_warmup_steps,
            )
        set_rates(
            optimizer,
            schedule=schedule,
            learning_rate=self.learning_rate,
            weight_decay=self.adam_weight_decay,
        )

    def on_train_batch_end(self, *args: Any) -> None:
        """Count DeepSpeed's steps, where the average's callback hasn't."""
        self.judge_deepspeeds_step()

    def judge_deepspeeds_step(self) -> None:
        """Count DeepSpeed's last step, once: it leaves bad ones out by itself and tells later."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            num_skipped = self._count_skipped()
            if self.trainer.global_step != self._num_steps:
                is_bad = num_skipped > self._num_skipped
                self.finite_steps.judge(self.loss_sums.new_tensor(torch.inf if is_bad else 0.0))
            self._num_steps, self._num_skipped = self.trainer.global_step, num_skipped

    def _count_skipped(self) -> int:
        """Return the steps that DeepSpeed has left out so far."""
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            return strategy.deepspeed_engine.skipped_steps
        return 0

    def on_before_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Encode what the cache lacks, while the batch is on the CPU: a hit costs no wait.

        Training takes what is written, so that hit and miss are the same bits.
        """
        slots, moments = batch.pop("slot", None), batch.get("moments")
        if slots is None or moments is None:
            return batch
        assert self.moments_cache is not None
        for i, numbers in enumerate(slots.tolist()):
            slot = Slot(*numbers)
            if slot == NO_SLOT:
                continue
            encoded = self.moments_cache.read(slot)  # written since the loader looked?
            if encoded is None:
                self.base.move_vae(self.device)
                encoded = self.base.encode_alone(batch["image"][i].to(self.device))
                self.moments_cache.write(slot, encoded)
            moments[i] = torch.from_numpy(encoded)
        return batch

    def _put_vae_away(self) -> None:
        """Free the device of the VAE until a picture is missing in the cache, or is to be shown."""
        if self.moments_cache is not None:
            self.base.move_vae(torch.device("cpu"))

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch and add it to the running sums if it is finite."""
        losses = self.loss(batch, self.controlnet)
        loss = self.finite_steps.watch(losses, image_ids=batch["image_id"])
        value = loss.detach()
        is_finite = value.isfinite()
        self.loss_sums += torch.stack([value.where(is_finite, 0), is_finite.float()]).repeat(2)
        return loss

    def loss(self, batch: Sample, controlnet: ControlNetModel | None) -> Tensor:
        """Compute each latent cell's noise-prediction error, (B, h, w) float32.

        Without a ControlNet it is the frozen base's.
        Source: Zhang et al. 2023, equation 1; Ho et al. 2020, equation 14.
        """
        base, timesteps, noise = self.base, batch["timestep"], batch["noise"]
        moments = batch.get("moments")
        if moments is None:
            moments = base.encode_image(normalize_image(batch["image"]))
        latents = base.sample_latents(moments, posterior_noise=batch["posterior_noise"])
        noisy_latents = base.noise_scheduler.add_noise(latents, noise, timesteps)  # type: ignore[arg-type]
        with self._autocast():
            model_pred = self._predict_noise(
                controlnet,
                base.unet,
                noisy_latents=noisy_latents,
                timesteps=timesteps,
                encoder_hidden_states=base.encode_prompt(
                    batch["input_ids"], is_empty=not any(batch["prompt"])
                ),
                conditioning=make_conditioning(batch["image"], batch["mask"]),
            )
        target = prediction_target(
            base.noise_scheduler, latents=latents, noise=noise, timesteps=timesteps
        )
        loss = F.mse_loss(model_pred.float(), target, reduction="none").mean(dim=1)
        if self.snr_gamma is not None:
            weights = min_snr_weights(base.noise_scheduler, timesteps, snr_gamma=self.snr_gamma)
            loss = loss * weights[:, None, None]
        return loss

    def _autocast(self) -> torch.autocast:
        """Lightning's own context doesn't get through to here: DeepSpeed's engine disables it."""
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def on_train_epoch_start(self) -> None:
        """Begin a new epoch mean."""
        self.loss_sums[2:] = 0
        self._put_vae_away()

    def on_train_epoch_end(self) -> None:
        """Give the epoch's mean loss, over all ranks, to the checkpoints' names and ranking."""
        self.log("train_loss", self.mean_loss(epoch=True), logger=False)

    def mean_loss(self, *, epoch: bool) -> Tensor:
        """Return the mean loss of all ranks, () float32, since the last log point or this epoch.

        Every rank must call it. The mean since the last log point starts anew.
        """
        part = self.loss_sums[2:] if epoch else self.loss_sums[:2]
        total, count = self.gather(part).reshape(-1, 2).sum(dim=0)
        if not epoch:
            self.loss_sums[:2] = 0
        return (total / count).float()

    def gather(self, tensor: Tensor) -> Tensor:
        """Collect a tensor from all ranks: (...) -> (world_size, ...), or as it is with one."""
        return cast(Tensor, self.all_gather(tensor))

    def on_validation_start(self) -> None:
        """Leave compiled networks to training: validation would compile them anew, for minutes."""
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self) -> None:
        """Go on with them."""
        torch.compiler.set_stance("default")

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        """Keep each picture's losses; noise, timesteps and holes are fixed for ever."""
        losses = losses_by_place(self.loss(batch, self.best_controlnet), mask=batch["mask"])
        losses |= {"loss_base": self._base_loss(batch), "timestep": batch["timestep"]}
        self._validation_losses.append({**losses, "image_id": batch["image_id"]})

    def _base_loss(self, batch: Sample) -> Tensor:
        """Return each picture's loss without the ControlNet, (B,): it never changes in a run."""
        ids = batch["image_id"].tolist()
        if not set(ids) <= self._base_losses.keys():
            losses = self.loss(batch, None).mean(dim=(1, 2)).tolist()
            self._base_losses = dict(zip(ids, losses, strict=True)) | self._base_losses
        return torch.tensor([self._base_losses[image_id] for image_id in ids], device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss with its parts and its base, over all ranks' pictures."""
        parts, self._validation_losses = self._validation_losses, []
        pictures = {
            name: self.gather(torch.cat([part[name] for part in parts])).flatten().cpu()
            for name in parts[0]
        }
        num_steps = self.base.noise_scheduler.config["num_train_timesteps"]
        self.log_dict(summarize_losses(pictures, num_train_timesteps=num_steps), logger=False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the ControlNet, and diffusers' schedule in optimizer steps."""
        optimizer = build_adamw(
            [p for p in self.controlnet.parameters() if p.requires_grad],
            learning_rate=self.learning_rate,
            weight_decay=self.adam_weight_decay,
            use_8bit_adam=self.use_8bit_adam,
            is_offloaded=_offloads_optimizer(self.trainer.strategy),
            # Under fp16 a fused one would unscale by itself: Lightning then refuses to clip.
            is_fused=self.device.type in ("cpu", "cuda") and self.precision != "16-mixed",
        )
        schedule = get_scheduler(
            self.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=self.lr_warmup_steps,
            num_training_steps=self.num_training_steps,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 1},
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the global norm, keep it (before clipping) for the log, leave bad steps out."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return
        limit = gradient_clip_val or float("inf")
        parameters = optimizer.param_groups[0]["params"]  # all: walking the modules takes 0.5 ms
        self._grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        self.finite_steps.leave_out(optimizer, grad_norm=self._grad_norm)

    def update_average(self, *, num_steps: int) -> None:
        """Move the average towards the parameters after an optimizer step that wasn't left out.

        The decay grows from 0.1, so that the first steps don't linger: Source: diffusers'
        EMAModel, min(decay, (1 + n) / (10 + n)).

        Args:
            num_steps: optimizer steps done so far, n.
        """
        assert self.average is not None
        assert self.ema_decay is not None
        decay = min(self.ema_decay, (1 + num_steps) / (10 + num_steps))
        # Decided on the device: a weight of 0 keeps every bit, and another one's bits are those
        # of a plain number.
        weight = torch.where(self.finite_steps.is_bad, 0.0, 1 - decay)
        pairs = zip(self.average.parameters(), self.controlnet.parameters(), strict=True)
        for average, parameter in pairs:
            average.lerp_(parameter.detach().float(), weight)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the average, each rank's running sums, the unit of time; every rank takes part."""
        checkpoint["loss_sums"] = self.gather(self.loss_sums).reshape(-1, 4).cpu()
        checkpoint["steps_per_epoch"] = self._steps_per_epoch
        if self.average is not None:
            checkpoint["average"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the average and the running sums.

        Raises:
            ValueError: --ema_decay is set and the checkpoint has no average.
        """
        self._is_resumed = True
        self._earlier_steps_per_epoch = checkpoint.get("steps_per_epoch", 0)
        sums = checkpoint["loss_sums"]
        if len(sums) == self.trainer.world_size:
            self.loss_sums = sums[self.global_rank].to(self.device)
        else:  # another number of ranks: the total is what the next mean needs
            self.loss_sums = (sums.sum(dim=0) / self.trainer.world_size).to(self.device)
        if self.average is not None:
            if "average" not in checkpoint:
                raise ValueError(
                    "--ema_decay needs a checkpoint with an average, got one without. "
                    "Resume without --ema_decay, or start anew with --controlnet_weights."
                )
            self.average.load_state_dict(checkpoint["average"], strict=True)


def _offloads_optimizer(strategy: Strategy) -> bool:
    if not isinstance(strategy, DeepSpeedStrategy):
        return False
    assert isinstance(strategy.config, dict)
    return "offload_optimizer" in strategy.config.get("zero_optimization", {})
