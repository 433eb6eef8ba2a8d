"""What the commands use when no data and no base are named: drawn scenes and a small base."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from demo.scenes import write_scenes

BASE_DIR = Path(__file__).resolve().parent / "base"  # made by demo.train_base
NUM_SCENES = 8192
SCENE_SIZE_PX = 64
TRAINING_SEED, UNSEEN_SEED = 0, 1  # of the demo; neither is the base's
# Part of the folders' names: raise it when the drawings change.
VERSION = 1


@dataclass(frozen=True)
class Scenes:
    """Where drawn scenes lie, in COCO's layout."""

    image_dir: Path
    ann_file: Path
    caption_file: Path

    @classmethod
    def in_folder(cls, folder: Path) -> Scenes:
        """Return where they lie in a folder that `write_scenes` made."""
        annotations = folder / "annotations"
        return cls(folder / "images", annotations / "instances.json", annotations / "captions.json")


def prepare_scenes(folder: Path) -> Scenes:
    """Draw the scenes that the demo trains on, once, into a cache folder.

    Args:
        folder: the cache; everything in it can be made again.
    """
    return _prepare_scenes(folder, num_scenes=NUM_SCENES, seed=TRAINING_SEED)


def prepare_unseen_scenes(folder: Path, *, num_scenes: int) -> Scenes:
    """Draw scenes that neither base nor demo trains on, once, into a cache folder."""
    return _prepare_scenes(folder, num_scenes=num_scenes, seed=UNSEEN_SEED)


def _prepare_scenes(folder: Path, *, num_scenes: int, seed: int) -> Scenes:
    scenes = _make_once(
        folder / f"scenes-{VERSION}-{num_scenes}x{SCENE_SIZE_PX}px-seed{seed}",
        make=lambda path: write_scenes(path, num_scenes=num_scenes, size=SCENE_SIZE_PX, seed=seed),
    )
    return Scenes.in_folder(scenes)


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
