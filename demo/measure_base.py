"""Hold the demo's base against its bars, on scenes that it has not seen.

    python -m demo.measure_base demo/base docs/base_samples.png

Prints the VAE's reconstruction PSNR, and how often a scene's own caption explains it better than
another's; draws a sheet of samples with their captions below.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from demo.captions import write_captions
from demo.scenes import draw_scene
from inpainting.captions import tokenize
from inpainting.diffusion import normalize_image, prediction_target
from inpainting.randomness import generator
from model import Base, load_base

UNSEEN_SEED = 2
NUM_SCENES = 256
NUM_PAIRS = 32  # of timestep and noise
TIMESTEPS = (100, 900)
NUM_SAMPLES, NUM_COLUMNS = 16, 4
NUM_STEPS, GUIDANCE_SCALE = 50, 6.5
CELL_PX, TEXT_PX = 256, 66


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, draw, print."""
    parser = argparse.ArgumentParser(prog="python -m demo.measure_base", allow_abbrev=False)
    parser.add_argument("base_dir", type=Path)
    parser.add_argument("sheet_path", type=Path, help="a .png file")
    args = parser.parse_args(argv)
    base = load_base(str(args.base_dir))
    scenes = [draw_scene(i, size=base.image_size, seed=UNSEEN_SEED) for i in range(NUM_SCENES)]
    image = torch.from_numpy(np.stack([image for image, _, _ in scenes])).permute(0, 3, 1, 2)
    captions = [write_captions(plan)[0] for _, _, plan in scenes]
    psnr = reconstruction_psnr(base, image)
    print(f"reconstruction of {NUM_SCENES} unseen scenes: {psnr.mean():.2f} dB, "
          f"from {psnr.min():.2f} to {psnr.max():.2f}")  # fmt: skip
    share = caption_share(base, image, captions=captions)
    print(f"the right caption has the lower loss on {share:.1%} of them")
    draw_samples(args.base_dir, captions=captions[:NUM_SAMPLES]).save(args.sheet_path)
    print(f"samples: {args.sheet_path}")
    return 0


@torch.no_grad()
def reconstruction_psnr(base: Base, image: Tensor) -> Tensor:
    """Return each picture's PSNR in dB after the VAE, rounded to grey levels, (N,) float32."""
    results = []
    for batch in image.split(32):
        mean = base.vae.encode(normalize_image(batch)).latent_dist.mean  # type: ignore[union-attr]
        decoded = base.vae.decode(mean).sample  # type: ignore[union-attr]
        levels = ((decoded + 1) * 127.5).clamp(0, 255).round()
        squared_error = (levels - batch).square().mean(dim=(1, 2, 3))
        results.append(10 * (255**2 / squared_error).log10())
    return torch.cat(results)


@torch.no_grad()
def caption_share(base: Base, image: Tensor, *, captions: Sequence[str]) -> float:
    """Return the share of pictures whose own caption gives a lower loss than the next one's.

    Each picture's two losses are means over the same pairs of timestep and noise.
    """
    timesteps = torch.linspace(*TIMESTEPS, NUM_PAIRS).round().long()
    input_ids = torch.stack([tokenize(base.tokenizer, caption) for caption in captions])
    hidden_states = base.encode_prompt(input_ids)
    side = image.shape[-1] // base.stride
    latent_shape = (base.vae.config["latent_channels"], side, side)
    num_better = 0
    for index in range(len(image)):
        rng = generator(UNSEEN_SEED, "pairs", index)
        shape = (NUM_PAIRS + 1, *latent_shape)
        draws = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        moments = base.encode_image(normalize_image(image[index][None]))
        latents = base.sample_latents(moments, posterior_noise=draws[:1])
        latents, noise = latents.expand(NUM_PAIRS, -1, -1, -1), draws[1:]
        noisy_latents = base.noise_scheduler.add_noise(latents, noise, timesteps)  # type: ignore[arg-type]
        target = prediction_target(
            base.noise_scheduler, latents=latents, noise=noise, timesteps=timesteps
        )
        right, other = (
            (
                base.unet(
                    noisy_latents,
                    timesteps,
                    hidden_states[caption].expand(NUM_PAIRS, -1, -1),
                    return_dict=False,
                )[0]
                - target
            )
            .square()
            .mean()
            for caption in (index, (index + 1) % len(captions))
        )
        num_better += int(right < other)
    return num_better / len(image)


def draw_samples(base_dir: Path, *, captions: Sequence[str]) -> Image.Image:
    """Sample a picture for each caption and put them on one sheet, the words below."""
    pipeline = StableDiffusionPipeline.from_pretrained(base_dir, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.scheduler = scheduler
    num_rows = -(-len(captions) // NUM_COLUMNS)
    sheet = Image.new("RGB", (NUM_COLUMNS * CELL_PX, num_rows * (CELL_PX + TEXT_PX)), "white")
    ink = ImageDraw.Draw(sheet)
    for number, caption in enumerate(captions):
        image = pipeline(
            caption,
            num_inference_steps=NUM_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=torch.Generator().manual_seed(number),
        ).images[0]  # type: ignore[union-attr]
        left = number % NUM_COLUMNS * CELL_PX
        top = number // NUM_COLUMNS * (CELL_PX + TEXT_PX)
        enlarged = image.resize((CELL_PX - 8, CELL_PX - 8), Image.Resampling.BICUBIC)
        sheet.paste(enlarged, (left + 4, top + 4))
        words = "\n".join(textwrap.wrap(caption, 42)[:4])
        ink.multiline_text((left + 6, top + CELL_PX), words, fill="black")
    return sheet


if __name__ == "__main__":
    sys.exit(main())
