"""Time what makes a sample, stage by stage: milliseconds of one loader worker.

    OMP_NUM_THREADS=1 python -m benchmarks.data --image_dir data/coco/train2017

The stages are the functions that data.py calls, timed where it calls them. Without --image_dir
photograph-sized scenes are drawn.

    OMP_NUM_THREADS=1 python -m benchmarks.data --num_workers 8 --samples_per_s 130

measures too which share of its time a training would wait for such loader workers, were its steps
so fast: a step that sleeps takes the batches. Every moment is in the cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import CLIPTokenizer

import data
from benchmarks.timing import Spread, describe_machine
from data import CocoInpaintingDataset, Sample, SampleRule
from demo.defaults import Scenes
from demo.random_base import write_byte_tokenizer
from demo.scenes import write_scenes
from inpainting.arguments import module_parser
from inpainting.coco import CocoIndex
from inpainting.latents import NO_SLOT, MomentsCache, Slot
from inpainting.runs import cache_dir
from inpainting.unreadable import UnreadablePictures

STRIDE = 8
# What the table says, and whose function it is that data.py calls.
STAGES: dict[str, tuple[object, str]] = {
    "read and decode": (UnreadablePictures, "open_picture"),
    "cut and resize": (data, "resize_image"),
    "draw the hole": (data, "draw_mask"),
    "choose the prompt": (data, "choose_prompt"),
    "tokenize": (data, "tokenize"),
    "hash the pixels": (data, "tag_pixels"),
    "look up the moments, without the hash": (data, "_read_moments"),
}
REST = "random numbers and the rest"
MIXTURE = {"irregular": 0.5, "rectangle": 0.2, "object": 0.3}


@contextmanager
def timed_stages(stages: Mapping[str, tuple[object, str]]) -> Iterator[dict[str, float]]:
    """Yield the ms that each stage has taken, without the stages within it."""
    totals: dict[str, float] = defaultdict(float)
    originals = {stage: getattr(owner, name) for stage, (owner, name) in stages.items()}
    inner_ms = [0.0]

    def wrap(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            inner_ms.append(0.0)
            start = time.thread_time()
            result = function(*args, **kwargs)
            elapsed = (time.thread_time() - start) * 1e3
            totals[stage] += elapsed - inner_ms.pop()
            inner_ms[-1] += elapsed
            return result

        return timed

    for stage, (owner, name) in stages.items():
        setattr(owner, name, wrap(stage, originals[stage]))
    try:
        yield totals
    finally:
        for stage, (owner, name) in stages.items():
            setattr(owner, name, originals[stage])


def measure(dataset: CocoInpaintingDataset, *, num_samples: int) -> dict[str, list[float]]:
    """Return the ms of each stage and of the whole ("total"), by sample."""
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(num_samples):
        address = divmod(number, len(dataset))
        with timed_stages(STAGES) as stages:
            start = time.thread_time()
            dataset[address]
            total = (time.thread_time() - start) * 1e3
        for name in STAGES:
            times[name].append(stages[name])
        times[REST].append(total - sum(stages.values()))
        times["total"].append(total)
    return times


def fill(dataset: CocoInpaintingDataset, *, num_samples: int) -> None:
    """Put zeros where the samples will look for moments, so that each look-up is a hit."""
    cache = dataset.moments_cache
    assert cache is not None
    zeros = torch.zeros(cache.moments_shape, dtype=torch.float16).numpy()
    for number in range(num_samples):
        sample: Any = dataset[divmod(number, len(dataset))]
        slot = Slot(*sample["slot"].tolist())
        if slot != NO_SLOT:
            cache.write(slot, zeros)


def measure_waiting(
    dataset: CocoInpaintingDataset,
    *,
    num_filled: int,
    batch_size: int,
    num_workers: int,
    samples_per_s: float,
    seconds: float,
) -> float:
    """Take batches from loader workers as fast as a training would.

    Args:
        dataset: what is loaded.
        num_filled: so many samples have their moments in the cache; they come again and again.
        batch_size: of each step.
        num_workers: loader processes.
        samples_per_s: what the training's own steps would do.
        seconds: how long, after the workers have started.

    Returns:
        the share of the time that went by between asking for a batch and getting it.
    """
    step_s = batch_size / samples_per_s
    # What the workers have ready at the start is not what they can do: two batches each, twice.
    num_first = 4 * num_workers
    num_steps = num_first + max(1, round(seconds / step_s))
    numbers = [number % num_filled for number in range(num_steps * batch_size)]
    addresses = [divmod(number, len(dataset)) for number in numbers]
    loader = DataLoader(
        dataset,
        batch_sampler=[addresses[i : i + batch_size] for i in range(0, len(addresses), batch_size)],
        num_workers=num_workers,
    )
    batches = iter(loader)
    waited_s = start = 0.0
    # On a GPU a training has a thread that receives the next batch, and pins it, during a step.
    with ThreadPoolExecutor(1) as receiver:
        received = receiver.submit(next, batches)
        for number in range(num_steps):
            if number == num_first:
                waited_s, start = 0.0, time.perf_counter()
            asked = time.perf_counter()
            received.result()
            waited_s += time.perf_counter() - asked
            received = receiver.submit(next, batches, None)
            time.sleep(step_s)
    return waited_s / (time.perf_counter() - start)


def sample_bytes(sample: Sample) -> int:
    """Return what of a sample goes to the device: all tensors but the slot."""
    tensors = [v for n, v in sample.items() if isinstance(v, torch.Tensor) and n != "slot"]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def open_dataset(args: argparse.Namespace, folder: Path) -> CocoInpaintingDataset:
    """Read the pictures that the flags name, or draw some, with a cache below a folder."""
    if args.image_dir is None:
        write_scenes(folder, num_scenes=args.num_scenes, size=args.scene_size, seed=0)
        scenes = Scenes.in_folder(folder)
        index = CocoIndex.from_annotations(
            scenes.image_dir, ann_file=scenes.ann_file, caption_file=scenes.caption_file,
            cache_dir=folder / "index",
        )  # fmt: skip
    elif args.ann_file is None:
        index = CocoIndex.from_folder(Path(args.image_dir), cache_dir=cache_dir() / "index")
    else:
        index = CocoIndex.from_annotations(
            Path(args.image_dir), ann_file=Path(args.ann_file), cache_dir=cache_dir() / "index"
        )
    write_byte_tokenizer(folder / "tokenizer")
    side = args.image_size // STRIDE
    return CocoInpaintingDataset(
        index,
        rows=range(len(index)),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        rule=SampleRule(
            image_size=args.image_size,
            latent_shape=(4, side, side),
            num_train_timesteps=1000,
            mask_types=MIXTURE,
            mask_area_range=(0.1, 0.3),
            empty_prompt_prob=0.5,
            num_crops=1,
            seed=0,
        ),
        is_training=True,
        moments_cache=MomentsCache(
            folder / "latents", image_ids=index.image_ids, moments_shape=(8, side, side)
        ),
        unreadable=UnreadablePictures(len(index), is_error=False),
    )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    parser = module_parser("benchmarks.data", manual=__doc__)
    add = parser.add_argument
    add("--image_dir", help="pictures; without it scenes are drawn")
    add("--ann_file", help="COCO instances json")
    add("--image_size", type=int, default=512, help="pixels (default 512)")
    add("--num_samples", type=int, default=200, help="(default 200)")
    add("--num_scenes", type=int, default=20, help="to draw (default 20)")
    add("--scene_size", type=int, default=640, help="their side in pixels (default 640)")
    add("--num_workers", type=int, help="measure how long a training waits for so many")
    add("--samples_per_s", type=float, default=130.0, help="... at this speed (default 130)")
    add("--batch_size", type=int, default=4, help="... with such batches (default 4)")
    add("--seconds", type=float, default=30.0, help="... for so long (default 30)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        dataset = open_dataset(args, Path(folder))
        fill(dataset, num_samples=args.num_samples)
        times = measure(dataset, num_samples=args.num_samples)
        num_bytes = sample_bytes(dataset[0, 0])
        waiting = None
        if args.num_workers:
            waiting = measure_waiting(
                dataset, num_filled=args.num_samples, batch_size=args.batch_size,
                num_workers=args.num_workers, samples_per_s=args.samples_per_s,
                seconds=args.seconds,
            )  # fmt: skip
    source = args.image_dir or f"drawn scenes of {args.scene_size} px"
    print(f"{source}, at {args.image_size} px; {describe_machine(torch.device('cpu'))}\n")
    print("| stage | CPU ms per sample (quartiles) |\n|---|---|")
    for name, values in times.items():
        print(f"| {name} | {Spread.of(values)} |")
    print(f"\n{num_bytes:,} bytes per sample")
    if waiting is not None:
        print(
            f"a training of {args.samples_per_s:g} samples/s, in batches of {args.batch_size}, "
            f"waits for {args.num_workers} workers {waiting:.2%} of its time"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
