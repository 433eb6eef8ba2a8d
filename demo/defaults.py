"""What the commands use when no data and no base are named: drawn scenes and a small base."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from demo.random_base import write_random_base
from demo.scenes import write_scenes

NUM_SCENES = 256
SCENE_SIZE_PX = 96
# Part of the folders' names: raise it when the drawings or the base change.
VERSION = 1


@dataclass(frozen=True)
class Demo:
    """Where the demo's data and base lie."""

    image_dir: Path
    ann_file: Path
    caption_file: Path
    base_dir: Path


def prepare_demo(folder: Path) -> Demo:
    """Draw the scenes and write the base, once, into a cache folder.

    Args:
        folder: the cache; everything in it can be made again.
    """
    scenes = _make_once(
        folder / f"scenes-{VERSION}-{NUM_SCENES}x{SCENE_SIZE_PX}px",
        make=lambda path: write_scenes(path, num_scenes=NUM_SCENES, size=SCENE_SIZE_PX, seed=0),
    )
    return Demo(
        image_dir=scenes / "images",
        ann_file=scenes / "annotations" / "instances.json",
        caption_file=scenes / "annotations" / "captions.json",
        base_dir=prepare_base(folder),
    )


def prepare_base(folder: Path) -> Path:
    """Write the demo's base, once, into a cache folder."""
    return _make_once(folder / f"base-{VERSION}", make=write_random_base)


def _make_once(target: Path, *, make: Callable[[Path], object]) -> Path:
    """Make a folder elsewhere and rename it: processes that start together don't mix."""
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".making-", dir=target.parent) as temporary:
            made = Path(temporary) / "made"
            make(made)
            with suppress(OSError):  # another process was first: its folder is the same
                made.rename(target)
    return target
