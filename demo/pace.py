"""How this machine trains the demo's networks best: in which precision, and how fast."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import torch

from demo.defaults import BASE_DIR, SCENE_SIZE_PX
from inpainting.captions import tokenize
from inpainting.devices import DTYPES, keep_freed_memory
from model import Base, build_controlnet, load_base, predict_noise

NUM_TIMED = 3


def measure_pace(*, batch_size: int) -> dict[str, float]:
    """Time the networks of a training step on one thread of the CPU, in seconds by --precision.

    Not all CPUs that can compute in bf16 are faster in it, and none says how fast it is. It happens
    in a process of its own, which takes its memory with it: the caller waits while others train.

    Args:
        batch_size: of the step; what the pictures show doesn't matter.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(_time_steps, batch_size).result()


def _time_steps(batch_size: int) -> dict[str, float]:
    keep_freed_memory("cpu")
    torch.set_num_threads(1)
    base = load_base(str(BASE_DIR))
    return {
        name: _time_step(base, dtype=DTYPES[name], batch_size=batch_size)
        for name in ("32", "bf16-mixed")
    }


def _time_step(base: Base, *, dtype: torch.dtype, batch_size: int) -> float:
    base.to(torch.device("cpu"), dtype=dtype, vae_dtype=torch.float32)
    controlnet = build_controlnet(base.unet, stride=base.stride)
    side = SCENE_SIZE_PX // base.stride
    latents = torch.zeros(batch_size, base.unet.config["in_channels"], side, side)
    hidden_states = base.encode_prompt(tokenize(base.tokenizer, "").expand(batch_size, -1))
    seconds = []
    for _ in range(1 + NUM_TIMED):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            model_pred = predict_noise(
                controlnet,
                base.unet,
                noisy_latents=latents,
                timesteps=torch.zeros(batch_size, dtype=torch.int64),
                encoder_hidden_states=hidden_states,
                conditioning=torch.zeros(batch_size, 3, SCENE_SIZE_PX, SCENE_SIZE_PX),
            )
        model_pred.float().square().mean().backward()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])  # the first one warms up
