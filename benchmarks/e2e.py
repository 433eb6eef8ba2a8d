"""Time our command against diffusers' train_controlnet.py as it is: whole runs, as a user types them.

    make bench-env
    curl -LO https://raw.githubusercontent.com/huggingface/diffusers/main/examples/controlnet/train_controlnet.py
    python -m benchmarks.e2e --peer train_controlnet.py --size small

Both run in one environment, which `make bench-env` makes (the peer needs torchvision and datasets),
on the CPU, in fp32, with one thread and no loader worker, from the same base of random weights and
the same picture files. The peer's conditioning is painted beforehand, as it has to be; ours draws its
holes. A long run less a short one leaves out the start and the end; what is left is all that a step
costs: reading, decoding, resizing, training, logging. No epoch ends within it. The peer comes twice
as the noise floor, and for the cached row the latents are there before it starts.
"""  # noqa: E501

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from benchmarks.networks import SIZES, write_base
from benchmarks.timing import Spread, describe_machine, ratios
from demo.defaults import Scenes
from demo.scenes import write_scenes
from inpainting.arguments import module_parser
from inpainting.quiet import quiet_libraries
from inpainting.runs import cache_dir

ROOT = Path(__file__).parents[1]
SCENE_SIZE_PX = 640
NEVER = "1000000"  # steps or epochs
NUM_THREADS = 1
PACKAGES = (
    "torch", "torchvision", "diffusers", "transformers", "accelerate", "datasets",
    "pytorch-lightning",
)  # fmt: skip
LIST_VERSIONS = """
import importlib.metadata, json
print(json.dumps({found.name: found.version for found in importlib.metadata.distributions()}))
"""
LAST_LINES = 15  # of a run that failed
PEER, AGAIN = "train_controlnet.py", "train_controlnet.py again (A/A)"
NOT_CACHED, CACHED = "ours, nothing cached", "ours, cached"


@dataclass(frozen=True)
class Place:
    """What both commands are given, in one folder.

    Attributes:
        folder: with data/ (pictures, annotations, and the peer's list of them), base/ and latents/.
        args: the benchmark's own flags.
    """

    folder: Path
    args: argparse.Namespace

    @property
    def data(self) -> Path:
        """The pictures with all that is known of them."""
        return self.folder / "data"

    def commands(self) -> dict[str, list[str]]:
        """Return each row's command, but for its number of steps and its output folder."""
        ours = [str(ROOT / "train_lightning.py"), *self.our_flags()]
        latents = str(self.folder / "latents")
        return {
            PEER: [self.args.peer, *self.peer_flags()],
            AGAIN: [self.args.peer, *self.peer_flags()],
            NOT_CACHED: [*ours, "--cache_latents", "off", "--max_steps"],
            CACHED: [*ours, "--cache_latents", latents, "--max_steps"],
        }

    def fill(self) -> list[str]:
        """Return the command that fills the cache of latents."""
        latents = str(self.folder / "latents")
        return ["-m", "tools.cache_latents", *self.our_flags(), "--cache_latents", latents]

    def peer_flags(self) -> list[str]:
        """Return what is typed after the peer's name."""
        return [
            "--pretrained_model_name_or_path", str(self.folder / "base"),
            "--train_data_dir", str(self.data), "--resolution", str(self.args.image_size),
            "--train_batch_size", str(self.args.batch_size), "--dataloader_num_workers", "0",
            "--learning_rate", "1e-5", "--lr_scheduler", "constant", "--mixed_precision", "no",
            "--proportion_empty_prompts", "0.5", "--seed", "42", "--checkpointing_steps", NEVER,
            "--max_train_steps",
        ]  # fmt: skip

    def our_flags(self) -> list[str]:
        """Return what is typed after our command's name."""
        scenes = Scenes.in_folder(self.data)
        return [
            "--pretrained_model_name_or_path", str(self.folder / "base"),
            "--image_dir", str(scenes.image_dir), "--ann_file", str(scenes.ann_file),
            "--caption_file", str(scenes.caption_file),
            "--image_size", str(self.args.image_size), "--batch_size", str(self.args.batch_size),
            "--num_workers", "0", "--learning_rate", "1e-5", "--lr_scheduler", "constant",
            "--precision", "32", "--accelerator", "cpu", "--empty_prompt_prob", "0.5",
            "--seed", "42", "--val_split", "0", "--log_images_every_n_steps", "0",
            "--save_every_n_steps", NEVER, "--save_every_n_epochs", NEVER,
        ]  # fmt: skip

    def run(self, arguments: Sequence[str]) -> float:
        """Run Python with these arguments; returns the CPU ms of it and all that it started.

        Raises:
            RuntimeError: it failed; with its last lines.
        """
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(NUM_THREADS), "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true",
            "HF_HOME": str(self.folder / "hub"), "XDG_CACHE_HOME": str(self.folder / "cache"),
        }  # fmt: skip
        log_path = self.folder / "run.log"
        start = _children_cpu_ms()
        with log_path.open("w") as log:
            code = subprocess.run(
                [self.args.python, *arguments],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            ).returncode  # fmt: skip
        elapsed = _children_cpu_ms() - start
        if code:
            lines = log_path.read_text(errors="replace").splitlines()[-LAST_LINES:]
            failure = f"a run of {arguments[0]} ended with exit code {code}. Its last lines:"
            raise RuntimeError("\n".join([failure, *lines]))
        return elapsed

    def train(self, command: Sequence[str], *, num_steps: int) -> float:
        """Train so many steps; returns CPU ms."""
        output_dir = self.folder / "outputs"
        elapsed = self.run([*command, str(num_steps), "--output_dir", str(output_dir)])
        shutil.rmtree(output_dir)
        return elapsed


def _children_cpu_ms() -> float:
    """Return the time of all ended children, their own ended children included."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) * 1e3


def prepare(place: Place) -> None:
    """Draw the pictures, paint the peer's conditioning, write the base."""
    # One batch more than the long run has: an epoch's end is not what is timed.
    num_scenes = place.args.batch_size * (max(place.args.num_steps) + 1)
    write_scenes(place.data, num_scenes=num_scenes, size=SCENE_SIZE_PX, seed=0)
    write_peer_data(place.data)
    write_base(
        place.folder / "base", SIZES[place.args.size], image_size=place.args.image_size
    )  # fmt: skip


def write_peer_data(folder: Path) -> None:
    """Make a COCO folder one that `datasets` reads too, its pictures where they are.

    Adds metadata.jsonl, with each picture's first caption, and conditioning/: the pictures with a
    black hole, as JPEG.
    """
    records = json.loads((folder / "annotations" / "captions.json").read_text(encoding="utf-8"))
    captions: dict[int, str] = {}
    for annotation in records["annotations"]:
        captions.setdefault(annotation["image_id"], annotation["caption"])
    (folder / "conditioning").mkdir()
    lines = []
    for record in records["images"]:
        name = record["file_name"]
        conditioning = f"conditioning/{Path(name).stem}.jpg"
        with Image.open(folder / "images" / name) as file:
            picture = file.convert("RGB")
        width, height = picture.size
        picture.paste((0, 0, 0), (width // 4, height // 4, width // 2, height // 2))
        picture.save(folder / conditioning)
        row = {
            "file_name": f"images/{name}",
            "conditioning_image_file_name": conditioning,
            "text": captions[record["id"]],
        }
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def measure(place: Place) -> dict[str, list[float]]:
    """Return each row's CPU ms per step, by round; rows come in the opposite order every other one.

    Raises:
        RuntimeError: a run failed.
    """
    commands, (short, long) = place.commands(), place.args.num_steps
    # First runs aren't timed: they leave indexes and compiled modules behind.
    place.train(commands[PEER], num_steps=short)
    place.run(place.fill())
    place.train(commands[CACHED], num_steps=short)
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(place.args.num_rounds):
        for name in list(commands)[:: -1 if turn % 2 else 1]:
            least = place.train(commands[name], num_steps=short)
            most = place.train(commands[name], num_steps=long)
            times[name].append((most - least) / (long - short))
    return times


def describe(place: Place, times: dict[str, list[float]]) -> str:
    """Return what was measured, and the table, as markdown."""
    args = place.args
    short, long = args.num_steps
    listed = subprocess.run(
        [args.python, "-c", LIST_VERSIONS], capture_output=True, text=True, check=True
    )  # fmt: skip
    found = json.loads(listed.stdout)
    machine = describe_machine(
        torch.device("cpu"), num_threads=NUM_THREADS,
        versions={name: found[name] for name in PACKAGES if name in found},
    )  # fmt: skip
    peer_hash = hashlib.sha256(Path(args.peer).read_bytes()).hexdigest()[:10]
    lines = [
        f"{args.size}, {args.image_size} px, batch {args.batch_size}, fp32, {args.num_rounds} "
        f"rounds of {short} and {long} steps; {machine}; the peer's SHA-256 {peer_hash}",
        "",
        "| row | CPU ms per step (quartiles) | times as fast (quartiles) |",
        "|---|---|---|",
    ]
    for name, values in times.items():
        lines.append(f"| {name} | {Spread.of(values)} | {Spread.of(ratios(times[PEER], values))} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's flags."""
    parser = module_parser("benchmarks.e2e", manual=__doc__)
    add = parser.add_argument
    add("--peer", required=True, help="diffusers' train_controlnet.py")
    add(
        "--python",
        default=str(cache_dir() / "bench-env" / "bin" / "python"),
        help="interpreter that runs both (default: of the environment that make bench-env makes)",
    )
    add("--size", choices=SIZES, default="small", help="of the networks (default small)")
    add("--image_size", type=int, help="pixels (default tiny 64, small 256, sd15 512)")
    add("--batch_size", type=int, default=1, help="(default 1)")
    add("--num_rounds", type=int, default=5, help="(default 5)")
    add(
        "--num_steps",
        type=int,
        nargs=2,
        default=(10, 50),
        metavar=("SHORT", "LONG"),
        help="of the two runs that are compared (default 10 50); what lies between must take many "
        "times the second or two by which two starts differ",
    )
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what can't be measured.

    Raises:
        ValueError, FileNotFoundError: in one line.
    """
    short, long = args.num_steps
    if not 1 <= short < long:
        raise ValueError(
            f"--num_steps must be a short and a long run, got {short} and {long}. Try 10 50."
        )
    if not Path(args.peer).is_file():
        raise FileNotFoundError(
            f"--peer must be diffusers' train_controlnet.py, got {args.peer}, which isn't there. "
            "--help says where to fetch it."
        )
    if not Path(args.python).is_file():
        raise FileNotFoundError(
            f"--python must be an interpreter with torchvision and datasets, got {args.python}, "
            "which isn't there. `make bench-env` makes one."
        )
    # The runs have another working folder. An environment's interpreter is a link: not resolved.
    args.peer, args.python = (str(Path(path).absolute()) for path in (args.peer, args.python))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 if a run failed, 2 for flags that can't be."""
    args = build_parser().parse_args(argv)
    args.image_size = args.image_size or SIZES[args.size].image_size
    try:
        check_flags(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), args)
        prepare(place)
        try:
            times = measure(place)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(describe(place, times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
