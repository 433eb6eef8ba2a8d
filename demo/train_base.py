"""Make the demo's base from nothing: vocabulary, VAE, then UNet and text encoder together.

    python -m demo.train_base demo/base

Every part is Stable Diffusion's own class at a small size, trained on drawn scenes alone. Stages
that are done, and the newest state of the one under way, lie in the cache folder: the same command
goes on where it was stopped. Numbers behind the choices: docs/log.md.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTokenizer

from demo.random_base import (
    PIPELINE_INDEX,
    build_scheduler,
    build_text_encoder,
    learn_merges,
    write_byte_tokenizer,
    write_json,
)
from demo.scene_pool import ScenePool
from inpainting.attention import FittingAttention
from inpainting.captions import tokenize
from inpainting.devices import best_device_type, keep_freed_memory
from inpainting.diffusion import min_snr_weights, normalize_image, prediction_target
from inpainting.runs import cache_dir
from lightning_checkpoints import AtomicCheckpointIO

logger = logging.getLogger("demo.train_base")

SEED = 20_261_125  # of the scenes and of the weights; the demo trains on seed 0, tests on others
NUM_SCENES = 32_768
SIZE_PX = 64
VAE_CHANNELS = (32, 64, 128)  # two halvings: stride 4
VAE_STEPS, VAE_BATCH, VAE_LR = 6_000, 8, 1e-3
# With the posterior's usual first deviation of 1 the VAE stays at the mean colour for minutes.
FIRST_LOG_VARIANCE = -6.0
KL_WEIGHT = 1e-4
TEXT_WIDTH = 128
UNET_CHANNELS = (64, 96, 128)
UNET_STEPS, UNET_BATCH, UNET_LR = 10_000, 32, 1e-3
UNET_EMA_DECAY = 0.999
SNR_GAMMA = 5.0
EMPTY_PROMPT_PROB = 0.1
NUM_CAPTIONS = 5
LOG_EVERY_N_STEPS = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are not done yet, and write the base."""
    args = parse_arguments(argv)
    work_dir = args.work_dir
    work_dir.mkdir(parents=True, exist_ok=True)
    log_path = work_dir / "training.log"
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(log_path)]
    logging.basicConfig(format="%(message)s", handlers=handlers, level=logging.WARNING)
    logger.setLevel(logging.INFO)
    keep_freed_memory(best_device_type() if args.accelerator == "auto" else args.accelerator)
    pool = ScenePool(work_dir, num_scenes=args.num_scenes, size=SIZE_PX, seed=SEED)
    base_dir = work_dir / "base"
    if not (base_dir / "tokenizer").exists():
        write_byte_tokenizer(
            base_dir / "tokenizer",
            merges=learn_merges(caption for captions in pool.captions for caption in captions),
        )
    if not (base_dir / "vae").exists():
        train_vae(pool, work_dir=work_dir, num_steps=args.vae_steps, accelerator=args.accelerator)
    if not (base_dir / "unet").exists():
        train_unet(pool, work_dir=work_dir, num_steps=args.unet_steps, accelerator=args.accelerator)
    build_scheduler("v_prediction").save_pretrained(base_dir / "scheduler")
    write_json(base_dir / "model_index.json", PIPELINE_INDEX)
    shutil.copytree(base_dir, args.output_dir, dirs_exist_ok=True)
    shutil.copy(log_path, args.output_dir)
    logger.info("done: %s", args.output_dir)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; the defaults are what demo/base was made with."""
    parser = argparse.ArgumentParser(prog="python -m demo.train_base", allow_abbrev=False)
    parser.add_argument("output_dir", type=Path, help="the base's folder, for example demo/base")
    parser.add_argument("--work_dir", type=Path, default=cache_dir() / "train_base",
                        help="scenes and unfinished states (default: %(default)s)")  # fmt: skip
    parser.add_argument("--num_scenes", type=int, default=NUM_SCENES)
    parser.add_argument("--vae_steps", type=int, default=VAE_STEPS, help="optimizer steps")
    parser.add_argument("--unet_steps", type=int, default=UNET_STEPS, help="optimizer steps")
    parser.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "gpu", "mps"))
    return parser.parse_args(argv)


def train_vae(pool: ScenePool, *, work_dir: Path, num_steps: int, accelerator: str) -> None:
    """Train the VAE, scale its latents to unit variance, and save it."""
    pl.seed_everything(SEED, verbose=False)
    module = VaeTraining(num_steps=num_steps)
    fit(module, data=PictureSet(pool), batch_size=VAE_BATCH, name="vae", work_dir=work_dir,
        num_steps=num_steps, accelerator=accelerator)  # fmt: skip
    vae = module.vae.float().eval()
    mean, deviation = encode(vae, pool.images[: 2**10])
    spread = torch.cat([mean.flatten(), mean.flatten() + deviation.flatten()]).std()
    vae.register_to_config(scaling_factor=round(float(1 / spread), 5))
    save(work_dir / "base" / "vae", vae.half().save_pretrained)


def train_unet(pool: ScenePool, *, work_dir: Path, num_steps: int, accelerator: str) -> None:
    """Train UNet and text encoder on the VAE's latents, and save them."""
    pl.seed_everything(SEED, verbose=False)
    base_dir = work_dir / "base"
    vae = cast(AutoencoderKL, AutoencoderKL.from_pretrained(base_dir / "vae"))
    tokenizer = CLIPTokenizer.from_pretrained(base_dir / "tokenizer")
    module = DiffusionTraining(vocabulary_size=len(tokenizer), num_steps=num_steps)
    data = LatentSet(pool, vae=vae, tokenizer=tokenizer, cache=work_dir / "latents.pt")
    fit(module, data=data, batch_size=UNET_BATCH, name="unet", work_dir=work_dir,
        num_steps=num_steps, accelerator=accelerator,
        callbacks=[EMAWeightAveraging(decay=UNET_EMA_DECAY)])  # fmt: skip
    save(base_dir / "text_encoder", module.text_encoder.half().save_pretrained)
    save(base_dir / "unet", module.unet.half().save_pretrained)


def fit(
    module: pl.LightningModule,
    *,
    data: Dataset,
    batch_size: int,
    name: str,
    work_dir: Path,
    num_steps: int,
    accelerator: str,
    callbacks: Sequence[pl.Callback] = (),
) -> None:
    """Train one stage, from its newest state where there is one."""
    newest = work_dir / f"{name}.ckpt"
    keep = ModelCheckpoint(
        dirpath=work_dir,
        filename=name,
        train_time_interval=timedelta(minutes=2),
        enable_version_counter=False,
    )
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        precision="bf16-mixed",
        max_steps=num_steps,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=work_dir,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*callbacks, keep, ProgressLines(name)],
    )
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
    trainer.fit(module, loader, ckpt_path=newest if newest.exists() else None, weights_only=True)


def save(folder: Path, write: Callable[[Path], Any]) -> None:
    """Write a part elsewhere and rename it: a folder that exists is a stage that is done."""
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    partial.rename(folder)


class ProgressLines(pl.Callback):
    """One line every LOG_EVERY_N_STEPS steps: step, the mean of each value, seconds so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._sums: dict[str, Tensor] = {}
        self._num_summed = 0
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: object
    ) -> None:
        """Add the step's values to the sums, and write a line where one is due."""
        for key, value in outputs.items():
            self._sums[key] = self._sums.get(key, torch.zeros(())) + value.detach().cpu()
        self._num_summed += 1
        if trainer.global_step % LOG_EVERY_N_STEPS == 0:
            means = (f"{k} {float(v) / self._num_summed:.4f}" for k, v in self._sums.items())
            logger.info("%s step %d: %s, %.0f s", self.name, trainer.global_step,
                        ", ".join(means), time.monotonic() - self._since)  # fmt: skip
            self._sums.clear()
            self._num_summed = 0


class PictureSet(Dataset[Tensor]):
    """The pool's pictures, (3, size, size) uint8."""

    def __init__(self, pool: ScenePool) -> None:
        self.pool = pool

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.pool.images[index].copy()).permute(2, 0, 1)


class VaeTraining(pl.LightningModule):
    """Reconstruction, and a little of the KL divergence: Rombach et al. 2022, section 3.1."""

    def __init__(self, *, num_steps: int) -> None:
        super().__init__()
        self.vae = build_vae()
        self.num_steps = num_steps

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss, and the reconstruction's PSNR in dB."""
        pixels = normalize_image(batch)
        posterior = self.vae.encode(pixels).latent_dist  # type: ignore[union-attr]
        reconstruction = self.vae.decode(posterior.sample()).sample.float()  # type: ignore[union-attr]
        squared_error = F.mse_loss(reconstruction, pixels)
        error = 0.5 * F.l1_loss(reconstruction, pixels) + 2 * squared_error
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        # Peak to peak [-1, 1] is 2: PSNR = 10 log10(2^2 / mse).
        psnr = -10 * squared_error.div(4).log10()
        return {"loss": error + KL_WEIGHT * divergence, "psnr": psnr, "kl": divergence}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under one cycle of the learning rate."""
        return one_cycle(self, peak=VAE_LR, num_steps=self.num_steps)


class LatentSet(Dataset[dict[str, Tensor]]):
    """Each scene's latents, drawn anew from the posterior, with one of its captions or none."""

    def __init__(
        self, pool: ScenePool, *, vae: AutoencoderKL, tokenizer: CLIPTokenizer, cache: Path
    ) -> None:
        if not cache.exists():
            moments = encode(vae, pool.images)
            torch.save([part.half() for part in moments], cache)
        self.mean, self.deviation = torch.load(cache, weights_only=True)
        self.scaling_factor = vae.config["scaling_factor"]
        captions = [caption for captions in pool.captions for caption in captions]
        self.input_ids = torch.stack([tokenize(tokenizer, caption) for caption in captions]).short()
        self.no_prompt = tokenize(tokenizer, "")

    def __len__(self) -> int:
        return len(self.mean)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        mean, deviation = self.mean[index].float(), self.deviation[index].float()
        caption = index * NUM_CAPTIONS + int(torch.randint(NUM_CAPTIONS, ()))
        is_empty = torch.rand(()) < EMPTY_PROMPT_PROB
        return {
            "latents": (mean + deviation * torch.randn_like(mean)) * self.scaling_factor,
            "input_ids": self.no_prompt if is_empty else self.input_ids[caption].long(),
        }


class DiffusionTraining(pl.LightningModule):
    """The prediction of v, weighted by Min-SNR; the text encoder learns with the UNet."""

    def __init__(self, *, vocabulary_size: int, num_steps: int) -> None:
        super().__init__()
        self.unet = build_unet()
        self.text_encoder = build_text_encoder(
            vocabulary_size, width=TEXT_WIDTH, mlp_width=4 * TEXT_WIDTH, num_layers=3
        )
        self.num_steps = num_steps
        scheduler = DDPMScheduler.from_config(build_scheduler("v_prediction").config)
        self.noise_scheduler = cast(DDPMScheduler, scheduler)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the weighted loss."""
        latents = batch["latents"]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (len(latents),), device=self.device)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)  # type: ignore[arg-type]
        hidden_states = self.text_encoder(batch["input_ids"])[0]
        model_pred = self.unet(noisy_latents, timesteps, hidden_states, return_dict=False)[0]
        target = prediction_target(
            self.noise_scheduler, latents=latents, noise=noise, timesteps=timesteps
        )
        losses = F.mse_loss(model_pred.float(), target, reduction="none").mean(dim=(1, 2, 3))
        weights = min_snr_weights(self.noise_scheduler, timesteps, snr_gamma=SNR_GAMMA)
        return {"loss": (losses * weights).mean(), "unweighted": losses.mean()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under one cycle of the learning rate."""
        return one_cycle(self, peak=UNET_LR, num_steps=self.num_steps)


def one_cycle(module: nn.Module, *, peak: float, num_steps: int) -> OptimizerLRScheduler:
    """Warm up for 5 % of the steps, then fall along a cosine to almost nothing."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=peak, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak, total_steps=num_steps + 1, pct_start=0.05, cycle_momentum=False
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def build_vae() -> AutoencoderKL:
    """Build the untrained VAE, its posterior nearly certain from the start."""
    num_blocks = len(VAE_CHANNELS)
    # The suppressions: diffusers annotates any number of blocks as exactly one.
    vae = AutoencoderKL(
        block_out_channels=VAE_CHANNELS,  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * num_blocks,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * num_blocks,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE_PX,
        mid_block_add_attention=False,
    )
    assert vae.quant_conv is not None
    with torch.no_grad():
        assert vae.quant_conv.bias is not None
        vae.quant_conv.bias[4:] = FIRST_LOG_VARIANCE
        vae.quant_conv.weight[4:] *= 0.1
    return vae


def build_unet() -> UNet2DConditionModel:
    """Build the untrained UNet: convolutions on 16 x 16 cells, attention on 8 x 8."""
    unet = UNet2DConditionModel(
        sample_size=SIZE_PX // 2 ** (len(VAE_CHANNELS) - 1),
        block_out_channels=UNET_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )
    unet.set_attn_processor(FittingAttention())  # type: ignore[arg-type]
    return unet


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the posterior's mean and deviation, (N, C, h, w) float32 each, unscaled."""
    means, deviations = [], []
    for start in range(0, len(images), 64):
        batch = torch.from_numpy(images[start : start + 64].copy()).permute(0, 3, 1, 2)
        posterior = vae.encode(normalize_image(batch)).latent_dist  # type: ignore[union-attr]
        means.append(posterior.mean)
        deviations.append(posterior.std)
    return torch.cat(means), torch.cat(deviations)


if __name__ == "__main__":
    sys.exit(main())
