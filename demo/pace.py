"""How fast this machine trains the demo's networks, and how long a training takes it."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from demo.defaults import BASE_DIR, NUM_SCENES, SCENE_SIZE_PX
from inpainting.captions import tokenize
from inpainting.devices import DTYPES, keep_freed_memory
from inpainting.quiet import quiet_libraries
from model import Base, build_controlnet, load_base, predict_noise

PRECISIONS = ("32", "bf16-mixed")
NUM_TIMED = 5
PATIENCE_S = 300.0  # with a process that doesn't come
HOPELESS = 4.0  # times as slow as fp32: beyond what warming up can take
# A step has more to do than its networks, and a run more than steps (docs/log.md).
STEP_PER_PACE = 1.4
NUM_VIEWS = 2  # of each picture: as it is, and mirrored


@dataclass(frozen=True)
class Pace:
    """What a process takes, while the others do the same.

    Attributes:
        step_s: seconds of the networks of a training step, forward and backward.
        encode_s: seconds in which the VAE encodes a picture.
    """

    step_s: float
    encode_s: float

    def training_s(self, num_steps: int, *, batch_size: int, num_processes: int) -> float:
        """Return the seconds that a training of so many steps takes, with nothing cached before.

        A picture's views are drawn with equal chance, and encoded by whoever meets them first.

        Args:
            num_steps: optimizer steps.
            batch_size: of all processes together.
            num_processes: how many share it.
        """
        num_epochs = num_steps * batch_size / NUM_SCENES
        num_encoded = NUM_VIEWS * NUM_SCENES * (1 - (1 - 1 / NUM_VIEWS) ** num_epochs)
        encoding_s = num_encoded / num_processes * self.encode_s
        return num_steps * self.step_s * STEP_PER_PACE + encoding_s


def measure_pace(*, batch_size: int, num_processes: int) -> dict[str, Pace]:
    """Time the demo's networks on the CPU, by --precision: in the slowest of so many processes.

    They have one thread each, and share the memory as those that train do. Not all CPUs that can
    compute in bf16 are faster in it, and none says how fast it is. The processes take their memory
    with them: the caller waits while others train.

    Args:
        batch_size: of one process; what the pictures show doesn't matter.
        num_processes: how many will train.
    """
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(num_processes, mp_context=context) as executor,
    ):
        # Each timing begins in all of them at once.
        wait = partial(manager.Barrier(num_processes).wait, PATIENCE_S)
        time_networks = partial(_time_networks, wait=wait)
        measured = list(executor.map(time_networks, [batch_size] * num_processes))
    return {
        name: Pace(
            step_s=max(paces[name].step_s for paces in measured),
            encode_s=max(paces[name].encode_s for paces in measured),
        )
        for name in PRECISIONS
    }


def _time_networks(batch_size: int, *, wait: Callable[[], object]) -> dict[str, Pace]:
    quiet_libraries()
    keep_freed_memory("cpu")
    torch.set_num_threads(1)
    base = load_base(str(BASE_DIR))
    paces: dict[str, Pace] = {}
    picture = torch.zeros(3, SCENE_SIZE_PX, SCENE_SIZE_PX, dtype=torch.uint8)
    for name in PRECISIONS:
        base.to(torch.device("cpu"), dtype=DTYPES[name], vae_dtype=DTYPES[name])
        # A CPU that only imitates bf16 takes 20 times as long: one step of that is enough.
        hopeless_s = HOPELESS * paces["32"].step_s if paces else math.inf
        step = _make_step(base, batch_size=batch_size)
        wait()
        step_s = _time(step, hopeless_s=hopeless_s)
        wait()
        paces[name] = Pace(step_s, encode_s=_time(partial(base.encode_alone, picture)))
    return paces


def _make_step(base: Base, *, batch_size: int) -> Callable[[], object]:
    controlnet = build_controlnet(base.unet, stride=base.stride)
    side, dtype = SCENE_SIZE_PX // base.stride, base.unet.dtype
    inputs = {
        "noisy_latents": torch.zeros(batch_size, base.unet.config["in_channels"], side, side),
        "timesteps": torch.zeros(batch_size, dtype=torch.int64),
        "conditioning": torch.zeros(batch_size, 3, SCENE_SIZE_PX, SCENE_SIZE_PX),
    }
    input_ids = tokenize(base.tokenizer, "").expand(batch_size, -1)

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            prompts = base.encode_prompt(input_ids)
            model_pred = predict_noise(
                controlnet, base.unet, encoder_hidden_states=prompts, **inputs
            )
        model_pred.float().square().mean().backward()

    return step


def _time(function: Callable[[], object], *, hopeless_s: float = math.inf) -> float:
    """Return a call's median seconds, the first one aside: or just that, where it is hopeless."""
    seconds = []
    for _ in range(1 + NUM_TIMED):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
        if seconds[0] > hopeless_s:
            return seconds[0]
    return median(seconds[1:])
