"""A pool of scenes that the base learns from: drawn once, mapped into memory, read in any order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from demo.captions import write_captions
from demo.scenes import draw_scene
from inpainting.atomic import replace_atomically, write_text_atomically

Captions = tuple[str, str, str, str, str]


class ScenePool:
    """Scenes 0 ... num_scenes - 1 of one seed, with their captions.

    Attributes:
        images: (N, size, size, 3) uint8 RGB, mapped from the disk.
        captions: five of each scene.
    """

    def __init__(self, folder: Path, *, num_scenes: int, size: int, seed: int) -> None:
        """Draw the scenes into a folder, unless they are there.

        Args:
            folder: a cache; about 12 KB a scene at 64 px.
            num_scenes: how many.
            size: the pictures' side in pixels.
            seed: of the series.
        """
        stem = f"scenes-{num_scenes}x{size}px-seed{seed}"
        images_path, captions_path = folder / f"{stem}.npy", folder / f"{stem}.json"
        if not captions_path.exists():  # written last: whoever finds it finds the pictures too
            captions: list[Captions] = []
            scenes = _draw_scenes(num_scenes=num_scenes, size=size, seed=seed, captions=captions)
            with replace_atomically(images_path) as temporary:
                shape = (num_scenes, size, size, 3)
                images = np.lib.format.open_memmap(temporary, "w+", dtype=np.uint8, shape=shape)
                for index, image in enumerate(scenes):
                    images[index] = image
                images.flush()
            write_text_atomically(captions_path, json.dumps(captions))
        self.images: np.ndarray = np.load(images_path, mmap_mode="r")
        self.captions: list[Captions] = json.loads(captions_path.read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.captions)


def _draw_scenes(
    *, num_scenes: int, size: int, seed: int, captions: list[Captions]
) -> Iterator[np.ndarray]:
    """Yield the pictures, (size, size, 3) uint8, and append their captions."""
    for index in tqdm(range(num_scenes), desc="drawing scenes", leave=False):
        image, _, plan = draw_scene(index, size=size, seed=seed)
        captions.append(write_captions(plan))
        yield image
