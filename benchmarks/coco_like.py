"""A data set as large as COCO, drawn to its statistics: files of the same size and shape.

Statistics of instances_train2017.json and captions_train2017.json: 860,001 records of 118,287
pictures, 19 points in a polygon (median 14), 1.08 polygons in an object, 1.2 % crowds, 80
categories, 5 captions of 53 characters a picture. Measured on 1,363 of these records.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from demo.scenes import draw_scene
from inpainting.randomness import generator

COCO_NUM_PICTURES = 118_287
RECORDS_PER_PICTURE = 860_001 / COCO_NUM_PICTURES
MEDIAN_POINTS, MEAN_POINTS = 14, 19
SECOND_POLYGON_SHARE = 0.08
CROWD_SHARE = 0.012
CROWD_RUNS = 200
NUM_CATEGORIES = 80
CAPTIONS_PER_PICTURE = 5
WORDS = "a man on red bench in front of old house with two dogs near blue water and green trees"
WORDS_PER_CAPTION = 12
WIDTH, HEIGHT = 640, 480
NUM_DRAWN = 32  # different pictures; the others are links to them


def write_coco_like(folder: Path, *, num_pictures: int, seed: int = 0) -> Path:
    """Write images/, annotations/instances.json and captions.json.

    Args:
        folder: made where it is missing.
        num_pictures: how many.
        seed: of everything.

    Returns:
        The folder.
    """
    images, annotations = folder / "images", folder / "annotations"
    images.mkdir(parents=True)
    annotations.mkdir()
    names = [f"{number + 1:012d}.jpg" for number in range(num_pictures)]
    _write_pictures(images, names, seed=seed)
    header = ",".join(
        f'{{"license": 3, "file_name": "{name}", "coco_url": '
        f'"http://images.cocodataset.org/train2017/{name}", "height": {HEIGHT}, "width": {WIDTH}, '
        f'"date_captured": "2013-11-21 01:37:46", "flickr_url": '
        f'"http://farm4.staticflickr.com/3448/3176652494_ba19663418_z.jpg", "id": {number + 1}}}'
        for number, name in enumerate(names)
    )
    rng = generator(seed, "coco-like")
    with (annotations / "instances.json").open("w") as file:
        file.write(f'{{"info": {{}}, "licenses": [], "images": [{header}], "annotations": [')
        _write_records(file.write, num_pictures=num_pictures, rng=rng)
        categories = ",".join(
            f'{{"supercategory": "thing", "id": {number}, "name": "thing {number}"}}'
            for number in range(1, NUM_CATEGORIES + 1)
        )
        file.write(f'], "categories": [{categories}]}}')
    with (annotations / "captions.json").open("w") as file:
        file.write(f'{{"info": {{}}, "licenses": [], "images": [{header}], "annotations": [')
        words = WORDS.split()
        for number in range(num_pictures * CAPTIONS_PER_PICTURE):
            caption = " ".join(rng.choice(words, WORDS_PER_CAPTION))
            row = f'"image_id": {number // CAPTIONS_PER_PICTURE + 1}, "caption": "{caption}."'
            file.write(f'{"," if number else ""}{{{row}, "id": {number + 1}}}')
        file.write("]}")
    return folder


def _write_pictures(folder: Path, names: list[str], *, seed: int) -> None:
    for number, name in enumerate(names):
        drawn = folder / names[number % NUM_DRAWN]
        if number < NUM_DRAWN:
            picture, _, _ = draw_scene(number, size=WIDTH, seed=seed)
            Image.fromarray(picture[:HEIGHT]).save(drawn, quality=95)
        else:
            os.link(drawn, folder / name)


def _write_records(
    write: Callable[[str], object], *, num_pictures: int, rng: np.random.Generator
) -> None:
    spread = np.sqrt(2 * np.log(MEAN_POINTS / MEDIAN_POINTS))
    annotation_id = 0
    for image_id in range(1, num_pictures + 1):
        for _ in range(rng.geometric(1 / RECORDS_PER_PICTURE)):
            annotation_id += 1
            is_crowd = rng.random() < CROWD_SHARE
            if is_crowd:
                cuts = np.unique(rng.integers(1, WIDTH * HEIGHT, CROWD_RUNS))
                runs = np.diff(cuts, prepend=0, append=WIDTH * HEIGHT).tolist()
                segmentation = f'{{"counts": {runs}, "size": [{HEIGHT}, {WIDTH}]}}'
            else:
                num_polygons = 1 + (rng.random() < SECOND_POLYGON_SHARE)
                num_points = rng.lognormal(np.log(MEDIAN_POINTS), spread, num_polygons)
                segmentation = str([_draw_polygon(max(3, round(n)), rng) for n in num_points])
            write(
                f'{"," if annotation_id > 1 else ""}{{"segmentation": {segmentation}, '
                f'"area": 1605.7768999999985, "iscrowd": {int(is_crowd)}, "image_id": {image_id}, '
                f'"bbox": [60.72, 30.31, 209.04, 208.06], '
                f'"category_id": {rng.integers(NUM_CATEGORIES) + 1}, "id": {annotation_id}}}'
            )


def _draw_polygon(num_points: int, rng: np.random.Generator) -> list[float]:
    """Return x0, y0, x1, ... around a centre, with two decimals."""
    size = np.array([WIDTH, HEIGHT])
    angles = np.sort(rng.uniform(0, 2 * np.pi, num_points))
    radius = rng.uniform(0.02, 0.25) * HEIGHT
    centre = rng.uniform(0.25, 0.75, 2) * size
    points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return points.round(2).ravel().tolist()
