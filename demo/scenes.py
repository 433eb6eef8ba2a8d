"""Scenes: drawn pictures with exact COCO records, in an ordinary COCO folder.

Picture `index` of a seed is the same at every size, on every machine. A *label map* says for each
pixel which thing is visible there; the records are made from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from demo.backdrops import (
    LAKE_SHORE,
    SKIES,
    draw_ground,
    draw_hills,
    draw_sky,
    mirror_in_lake,
)
from demo.captions import write_captions
from demo.composition import Plan, depth_of, plan_scene
from demo.kinds import CATEGORY_NAMES, KINDS
from demo.pen import COLORS, Canvas, Color, Light, Pen
from demo.records import describe_mask
from inpainting.atomic import write_text_atomically
from inpainting.randomness import generator


def write_scenes(folder: str | Path, *, num_scenes: int, size: int, seed: int) -> Path:
    """Write an ordinary COCO folder: images/, annotations/instances.json and captions.json.

    The two json files come last, so that a folder which has them is complete. Scene i is image i+1.

    Args:
        folder: made when missing; files of the same name are replaced.
        num_scenes: how many, >= 1.
        size: the pictures' side in pixels.
        seed: of the series, >= 0.

    Returns:
        The folder.

    Raises:
        ValueError: num_scenes or size is below 1.
    """
    if num_scenes < 1 or size < 1:
        raise ValueError(f"num_scenes and size must be at least 1, got {num_scenes} and {size}.")
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, instances, captions = [], [], []
    for index in tqdm(range(num_scenes), desc="drawing scenes", leave=False, disable=None):
        picture, labels, plan = draw_scene(index, size=size, seed=seed)
        image_id, file_name = index + 1, f"{index + 1:012d}.png"
        Image.fromarray(picture).save(folder / "images" / file_name, compress_level=4)
        images.append({"id": image_id, "file_name": file_name, "width": size, "height": size})
        for record in record_things(labels, plan=plan):
            instances.append({"id": len(instances) + 1, "image_id": image_id, **record})
        for caption in write_captions(plan):
            captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": caption})
    info = {"description": f"drawn scenes, seed {seed}", "version": "1.0"}
    header = {"info": info, "licenses": [], "images": images}
    categories = [
        {"id": number + 1, "name": name, "supercategory": "scene"}
        for number, name in enumerate(CATEGORY_NAMES)
    ]
    annotations = folder / "annotations"
    _write_json(annotations / "captions.json", {**header, "annotations": captions})
    instances_json = {**header, "annotations": instances, "categories": categories}
    _write_json(annotations / "instances.json", instances_json)
    return folder


def record_things(labels: np.ndarray, *, plan: Plan) -> list[dict[str, Any]]:
    """Return a COCO record, without its ids, for each thing that is visible.

    Args:
        labels: (H, W) uint8 label map of the plan, from `draw_scene`.
        plan: what was drawn.
    """
    records = []
    for number, thing in enumerate(plan.things):
        mask = labels == number + 1
        if mask.any():  # a small far thing can be hidden, or lost between pixels
            category_id = CATEGORY_NAMES.index(thing.name) + 1
            record = describe_mask(mask, is_crowd=thing.is_crowd)
            records.append({"category_id": category_id, **record})
    return records


def draw_scene(index: int, *, size: int, seed: int) -> tuple[np.ndarray, np.ndarray, Plan]:
    """Draw one scene.

    Args:
        index: which one, >= 0.
        size: the picture's side in pixels.
        seed: of the whole series, >= 0.

    Returns:
        The picture (size, size, 3) uint8 RGB; its label map (size, size) uint8, where k > 0 is the
        visible part of `plan.things[k - 1]`; the plan.
    """
    plan = plan_scene(index, seed=seed)
    rng = generator(seed, "backdrop", index)
    sky = SKIES[plan.sky]
    light = Light(sky.tint, sky.bottom, plan.sun_side, sky.is_dark)
    canvas = Canvas(size)
    draw_sky(canvas, sky=sky, light=light, horizon=plan.horizon, rng=rng)
    draw_hills(canvas, setting=plan.setting, sky=sky, light=light, horizon=plan.horizon, rng=rng)
    draw_ground(canvas, setting=plan.setting, light=light, horizon=plan.horizon, rng=rng)
    order = sorted(range(len(plan.things)), key=lambda number: plan.things[number].nearness)
    is_mirrored = plan.setting != "lake"
    for number in order:
        thing = plan.things[number]
        if not is_mirrored and thing.nearness > plan.horizon + LAKE_SHORE:
            mirror_in_lake(canvas, horizon=plan.horizon, light=light, rng=rng)
            is_mirrored = True
        thing_rng = generator(seed, "thing", index, number)
        _draw_thing(canvas, plan=plan, number=number, light=light, rng=thing_rng)
    if not is_mirrored:
        mirror_in_lake(canvas, horizon=plan.horizon, light=light, rng=rng)
    image, labels = canvas.reduce()
    return image, labels, plan


def _draw_thing(
    canvas: Canvas, *, plan: Plan, number: int, light: Light, rng: np.random.Generator
) -> None:
    thing = plan.things[number]
    kind = KINDS[thing.name]
    for member in thing.members:
        color_name = thing.color_name or kind.colors[rng.integers(len(kind.colors))]
        jitter = rng.integers(-12, 13, 3)
        red, green, blue = (np.asarray(COLORS[color_name]) + jitter).clip(0, 255).tolist()
        color: Color = (red, green, blue)
        depth = 1.0 if kind.zone == "sky" else depth_of(member.foot, horizon=plan.horizon)
        pen = Pen(
            canvas, x=member.x, foot=member.foot, height=member.height,
            looks_left=thing.looks_left, label=number + 1, light=light,
            haze=0.32 * (1 - depth) ** 1.5,
        )  # fmt: skip
        if kind.zone != "sky":
            pen.cast_shadow(kind.width / 2)
        kind.draw(pen, color=color, rng=rng)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text_atomically(path, json.dumps(content, separators=(",", ":")))
