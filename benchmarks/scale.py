"""Measure what a data set's size costs: its index, a sample, and a loader worker's memory.

    OMP_NUM_THREADS=1 python -m benchmarks.scale

Data sets like COCO of 1,000, 10,000 and 118,287 pictures are written (0.7 GB, most of it json) and
read as a training does. Everything is measured in a fresh process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.coco_like import COCO_NUM_PICTURES, write_coco_like
from benchmarks.networks import SIZES, write_base
from benchmarks.timing import Spread, describe_machine, ratios, take_turns
from demo.defaults import Scenes
from inpainting.arguments import module_parser
from inpainting.coco import CocoIndex
from inpainting.flags import build_parser as build_training_parser
from inpainting.metrics import bootstrap_interval
from inpainting.quiet import quiet_libraries

IMAGE_SIZE = 512
NUM_ROWS_READ = 1000  # of a mapped index, before its memory is read
WARM_UP = 16  # samples of each worker


def in_fresh_process(function: Callable[..., Any], *args: Any, cache: Path) -> Any:
    """Return what a function returns in a process that has done nothing else.

    Args:
        function: of a module.
        args: its arguments.
        cache: where the project's caches lie for it.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=_use_cache, initargs=(cache,)
    ) as pool:
        return pool.submit(function, *args).result()


def _use_cache(cache: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(cache)


def open_index(folder: Path, cache: Path) -> CocoIndex:
    """Open the index of a data set, built first where it isn't in the cache."""
    data = Scenes.in_folder(folder)
    return CocoIndex.from_annotations(
        data.image_dir, ann_file=data.ann_file, caption_file=data.caption_file,
        cache_dir=cache / "index",
    )  # fmt: skip


def measure_index(folder: Path, cache: Path) -> tuple[float, float, float, int]:
    """Open an index and read some of it.

    Returns:
        wall seconds to open it; MiB above the start at the peak; MiB that this process then has for
        itself, above the start; the number of records.
    """
    pid = os.getpid()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    peak_before, own_before = memory_mib(pid, "status", "VmHWM"), own_mib(pid)
    start = time.perf_counter()
    index = open_index(folder, cache)
    seconds = time.perf_counter() - start
    peak = memory_mib(pid, "status", "VmHWM") - peak_before
    for row in range(0, len(index), max(1, len(index) // NUM_ROWS_READ)):
        index.object_masks(row)
        index.captions(row)
    return seconds, peak, own_mib(pid) - own_before, index.num_rows_read["annotations"]


def own_mib(pid: int) -> float:
    """Return what a process has written itself: neither shared, nor mapped from a file."""
    return memory_mib(pid, "smaps_rollup", "Private_Dirty")


def memory_mib(pid: int, file: str, field: str) -> float:
    """Read a size that Linux tells of a process, in MiB."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def open_samples(folder: Path, base: Path, *, num_workers: int) -> Iterator[object]:
    """Return the training loader's endless samples, set up by the command itself."""
    from train_lightning import prepare

    quiet_libraries()
    data = Scenes.in_folder(folder)
    flags = [
        "--image_dir", str(data.image_dir), "--ann_file", str(data.ann_file),
        "--caption_file", str(data.caption_file),
        "--pretrained_model_name_or_path", str(base), "--output_dir", str(folder / "outputs"),
        "--image_size", str(IMAGE_SIZE), "--batch_size", "1", "--num_workers", str(num_workers),
        "--cache_latents", "off", "--accelerator", "cpu",
    ]  # fmt: skip
    run = prepare(build_training_parser().parse_args(flags))
    assert run is not None
    run.datamodule.trainer = run.trainer

    def draw() -> Iterator[object]:
        while True:
            yield from run.datamodule.train_dataloader()

    return draw()


def measure_samples(
    folders: dict[int, Path], base: Path, num_rounds: int, num_samples: int
) -> dict[int, list[float]]:
    """Read samples of each data set in turns, in this process; returns CPU ms per sample."""
    samples = {size: open_samples(f, base, num_workers=0) for size, f in folders.items()}
    rows = {str(n): partial(consume, samples[n], num_samples=num_samples) for n in samples}
    times = take_turns(rows, num_rounds=num_rounds, device=torch.device("cpu"))
    return {int(name): [ms / num_samples for ms in values] for name, values in times.items()}


def consume(samples: Iterator[object], *, num_samples: int) -> None:
    """Take so many samples."""
    for _ in islice(samples, num_samples):
        pass


def measure_workers(
    folder: Path, base: Path, num_workers: int, num_samples: int
) -> tuple[float, float]:
    """Let loader workers make samples.

    Returns:
        samples per second; MiB that a worker has for itself, the largest of them.
    """
    samples = open_samples(folder, base, num_workers=num_workers)
    consume(samples, num_samples=WARM_UP * num_workers)
    start = time.perf_counter()
    consume(samples, num_samples=num_samples)
    seconds = time.perf_counter() - start
    own = max(own_mib(worker.pid or 0) for worker in multiprocessing.active_children())
    return num_samples / seconds, own


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as name:
        work = Path(name)
        cache = work / "cache"
        base = write_base(work / "base", SIZES["tiny"], image_size=IMAGE_SIZE)
        folders = {n: write_coco_like(work / f"{n}", num_pictures=n) for n in args.num_pictures}
        print(describe_machine(torch.device("cpu")), flush=True)
        print_indexes(folders, cache=cache)
        print_samples(args, folders, base=base, cache=cache)
        print_workers(args, folders, base=base, cache=cache)
    return 0


def print_indexes(folders: dict[int, Path], *, cache: Path) -> None:
    """Build each data set's index, and open it again."""
    print(
        "\n| pictures | records | json, MB | built in s | peak, MiB | on disk, MB | opened in s | "
        "own memory, MiB |\n|---|---|---|---|---|---|---|---|"
    )
    for num_pictures, folder in folders.items():
        json_bytes = sum(path.stat().st_size for path in (folder / "annotations").iterdir())
        here = set(cache.glob("index/*"))
        built_s, peak, _, records = in_fresh_process(measure_index, folder, cache, cache=cache)
        (index,) = set(cache.glob("index/*")) - here
        index_bytes = sum(path.stat().st_size for path in index.iterdir())
        opened_s, _, own, _ = in_fresh_process(measure_index, folder, cache, cache=cache)
        print(
            f"| {num_pictures:,} | {records:,} | {json_bytes / 1e6:,.0f} | {built_s:.1f} | "
            f"{peak:,.0f} | {index_bytes / 1e6:.1f} | {opened_s:.3f} | {own:.1f} |", flush=True,
        )  # fmt: skip


def print_samples(
    args: argparse.Namespace, folders: dict[int, Path], *, base: Path, cache: Path
) -> None:
    """Time samples of all data sets, in turns."""
    times = in_fresh_process(
        measure_samples, folders, base, args.num_rounds, args.num_samples, cache=cache
    )
    smallest = min(times)
    print(
        "\n| pictures | CPU ms per sample (quartiles) | as fast as the smallest (quartiles) | "
        "mean, 95 % interval |\n|---|---|---|---|"
    )
    for num_pictures, values in times.items():
        speeds = ratios(times[smallest], values)
        low, high = bootstrap_interval(np.array(speeds), seed=0)
        print(
            f"| {num_pictures:,} | {Spread.of(values)} | {Spread.of(speeds)} | "
            f"{fmean(speeds):.3f} ({low:.3f}-{high:.3f}) |", flush=True,
        )  # fmt: skip


def print_workers(
    args: argparse.Namespace, folders: dict[int, Path], *, base: Path, cache: Path
) -> None:
    """Let 1, 2 and 4 loader workers make samples of the smallest and the largest data set."""
    print("\n| pictures | workers | samples/s | own memory of a worker, MiB |\n|---|---|---|---|")
    for num_pictures in sorted({min(folders), max(folders)}):
        for num_workers in args.num_workers:
            speed, own = in_fresh_process(
                measure_workers, folders[num_pictures], base, num_workers, args.num_samples,
                cache=cache,
            )  # fmt: skip
            print(f"| {num_pictures:,} | {num_workers} | {speed:.1f} | {own:.1f} |", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    parser = module_parser("benchmarks.scale", manual=__doc__)
    add = parser.add_argument
    add(
        "--num_pictures", type=int, nargs="+", default=[1000, 10_000, COCO_NUM_PICTURES],
        help="of each data set (default 1000 10000 118287)",
    )  # fmt: skip
    add("--num_workers", type=int, nargs="+", default=[1, 2, 4], help="(default 1 2 4)")
    add("--num_rounds", type=int, default=60, help="(default 60)")
    add("--num_samples", type=int, default=100, help="a round (default 100)")
    add("--work_dir", help="where the data are written (default the system's temporary folder)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
