from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from demo.captions import write_captions
from demo.composition import plan_scene
from demo.kinds import CATEGORY_NAMES, KINDS
from demo.pen import COLORS, Canvas, Color, Light, Pen
from demo.records import describe_mask, encode_runs, trace_polygons
from demo.scenes import draw_scene, write_scenes

NUM_SCENES, SIZE, SEED = 40, 64, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("scenes")
    return write_scenes(target, num_scenes=NUM_SCENES, size=SIZE, seed=SEED)


@pytest.fixture(scope="module")
def coco(folder: Path) -> COCO:
    return COCO(str(folder / "annotations" / "instances.json"))


def decode_polygons(polygons: list[list[float]], shape: tuple[int, ...]) -> np.ndarray:
    runs = coco_mask.frPyObjects(polygons, *shape)  # type: ignore[arg-type]
    return coco_mask.decode(coco_mask.merge(runs)).astype(bool)


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    first = draw_scene(5, size=64, seed=1)
    draw_scene(6, size=64, seed=1)
    again = draw_scene(5, size=64, seed=1)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], draw_scene(5, size=64, seed=2)[0])
    assert not np.array_equal(first[0], draw_scene(6, size=64, seed=1)[0])


@pytest.mark.parametrize("index", range(16))
def test_a_scene_is_the_same_picture_at_every_size(index: int) -> None:
    small, small_labels, _ = draw_scene(index, size=64, seed=SEED)
    large, large_labels, _ = draw_scene(index, size=256, seed=SEED)
    reduced = np.asarray(Image.fromarray(large).reduce(4))
    psnr = 10 * np.log10(255**2 / np.mean((small.astype(float) - reduced) ** 2))
    assert psnr > 30, f"PSNR {psnr:.1f} dB"
    # Coarse cells don't see the edges' smoothing: 19 levels at most here, 22 when the number of
    # grass blades depends on the size.
    cells = [np.asarray(Image.fromarray(part).reduce(4), float) for part in (small, reduced)]
    difference = np.abs(cells[0] - cells[1]).max()
    assert difference < 21, f"a cell of 4x4 pixels differs by {difference:.0f} of 255"
    agreement = np.mean(small_labels == large_labels[2::4, 2::4])
    assert agreement > 0.97, f"{agreement:.3f} of the labels agree"


def make_pen(canvas: Canvas, *, height: float, label: int) -> Pen:
    light = Light(tint=(1.0, 1.0, 1.0), haze=(0, 0, 0), sun_side=1, is_dark=False)
    return Pen(canvas, x=0.5, foot=0.9, height=height, looks_left=True, label=label, light=light,
               haze=0.0)  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_the_label_map_is_exactly_what_a_thing_has_painted(name: str) -> None:
    kind, background = KINDS[name], (255, 0, 255)
    canvas = Canvas(64)
    canvas.picture.paste(background, (0, 0, canvas.side_px, canvas.side_px))
    pen = make_pen(canvas, height=0.9 / max(kind.width, 1.0), label=7)
    color: Color = COLORS[kind.colors[0]]
    kind.draw(pen, color=color, rng=np.random.default_rng(0))
    painted = (np.asarray(canvas.picture) != background).any(axis=-1)
    assert np.array_equal(np.asarray(canvas.labels), 7 * painted)
    xs = np.flatnonzero(painted.any(axis=0))
    width = (xs[-1] + 1 - xs[0]) / canvas.side_px / (0.9 / max(kind.width, 1.0))
    assert abs(width - kind.width) < 0.25, f"{name} is {width:.2f} wide, its kind says otherwise"


def test_a_later_thing_hides_an_earlier_one_and_a_shadow_hides_none() -> None:
    canvas = Canvas(32)
    make_pen(canvas, height=0.8, label=1).box(-0.5, 0.0, 0.5, 1.0, COLORS["red"])
    near = make_pen(canvas, height=0.4, label=2)
    near.cast_shadow(1.0)
    assert set(np.unique(np.asarray(canvas.labels))) == {0, 1}
    near.box(-0.5, 0.0, 0.5, 1.0, COLORS["blue"])
    image, labels = canvas.reduce()
    assert labels[22, 16] == 2
    assert tuple(image[22, 16]) == COLORS["blue"]
    assert labels[8, 16] == 1


def test_picture_and_labels_have_the_promised_types() -> None:
    image, labels, plan = draw_scene(0, size=50, seed=0)
    assert (image.shape, image.dtype) == ((50, 50, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((50, 50), np.uint8)
    assert labels.max() <= len(plan.things)


def test_every_category_appears_and_settings_and_hours_change() -> None:
    plans = [plan_scene(index, seed=0) for index in range(300)]
    assert {thing.name for plan in plans for thing in plan.things} == set(KINDS)
    assert len(KINDS) >= 12
    assert len({plan.setting for plan in plans}) == 9
    assert len({plan.sky for plan in plans}) == 5


def test_the_main_thing_is_large_and_stays_visible() -> None:
    for index in range(NUM_SCENES):
        _, labels, plan = draw_scene(index, size=SIZE, seed=SEED)
        share = np.mean(labels == 1)
        assert share > 0.025, f"scene {index}: {plan.things[0].name} covers {share:.3f}"


def test_records_decode_to_the_visible_pixels_bit_for_bit(coco: COCO) -> None:
    for index in range(NUM_SCENES):
        _, labels, plan = draw_scene(index, size=SIZE, seed=SEED)
        records = coco.imgToAnns[index + 1]
        visible = [number for number in range(len(plan.things)) if (labels == number + 1).any()]
        assert len(records) == len(visible)
        for record, number in zip(records, visible, strict=True):
            decoded = coco.annToMask(record).astype(bool)
            assert np.array_equal(decoded, labels == number + 1), f"scene {index}, thing {number}"
            assert record["area"] == decoded.sum()
            assert CATEGORY_NAMES[record["category_id"] - 1] == plan.things[number].name
            x, y, width, height = record["bbox"]
            assert decoded[y : y + height, x : x + width].sum() == decoded.sum()
            assert width * height > 0


def test_hidden_parts_belong_to_what_hides_them(coco: COCO) -> None:
    for image_id in coco.imgs:
        covered = sum(coco.annToMask(record).astype(int) for record in coco.imgToAnns[image_id])
        assert np.max(covered) == 1


def test_records_hold_every_form_that_coco_has(coco: COCO) -> None:
    records = list(coco.anns.values())
    crowds: list[dict] = [r["segmentation"] for r in records if r["iscrowd"]]  # type: ignore[misc]
    polygons: list[list] = [r["segmentation"] for r in records if not r["iscrowd"]]  # type: ignore[misc]
    assert crowds
    assert all(isinstance(runs["counts"], list) for runs in crowds)
    assert any(len(parts) == 1 for parts in polygons)
    assert any(len(parts) > 1 for parts in polygons)
    assert all(len(part) >= 8 and len(part) % 2 == 0 for parts in polygons for part in parts)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_polygons_of_any_mask_decode_to_it(density: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((17, 23)) < density
        assert np.array_equal(decode_polygons(trace_polygons(mask), mask.shape), mask)


def test_a_ring_is_cut_through_its_hole() -> None:
    mask = np.ones((5, 6), bool)
    mask[2, 2:4] = False
    polygons = trace_polygons(mask)
    assert len(polygons) == 2
    assert np.array_equal(decode_polygons(polygons, mask.shape), mask)


def test_pixels_that_touch_at_a_corner_are_two_polygons() -> None:
    assert trace_polygons(np.eye(2, dtype=bool)) == [
        [0, 0, 1, 0, 1, 1, 0, 1],
        [1, 1, 2, 1, 2, 2, 1, 2],
    ]


def test_run_lengths_go_down_the_columns_and_start_with_zeros() -> None:
    mask = np.array([[True, False, False], [True, True, False]])
    assert encode_runs(mask) == {"size": [2, 3], "counts": [0, 2, 1, 1, 2]}
    assert describe_mask(mask, is_crowd=True) == {
        "segmentation": {"size": [2, 3], "counts": [0, 2, 1, 1, 2]},
        "area": 3,
        "bbox": [0, 0, 2, 2],
        "iscrowd": 1,
    }


def test_five_captions_name_the_main_thing_its_colour_and_its_place() -> None:
    for index in range(200):
        plan = plan_scene(index, seed=SEED)
        captions = write_captions(plan)
        assert len(set(captions)) == 5
        main = plan.things[0]
        singular, plural = main.name, {"person": "people", "bus": "buses"}.get(main.name, main.name)
        for caption in captions:
            assert singular in caption or plural in caption, caption
            assert str(main.color_name) in caption, caption
            assert any(place in caption for place in ("left", "right", "middle", "side")), caption
            assert caption[0].isupper(), caption
            assert caption.endswith("."), caption
            assert len(caption.split()) < 55, caption  # 77 tokens hold it


def test_the_folder_is_an_ordinary_coco_folder(folder: Path, coco: COCO) -> None:
    for record in coco.imgs.values():
        with Image.open(folder / "images" / record["file_name"]) as image:
            assert image.size == (record["width"], record["height"]) == (SIZE, SIZE)
            picture = np.asarray(image)
        assert np.array_equal(picture, draw_scene(record["id"] - 1, size=SIZE, seed=SEED)[0])
    captions = json.loads((folder / "annotations" / "captions.json").read_text())["annotations"]
    assert len(captions) == 5 * NUM_SCENES
    assert {caption["image_id"] for caption in captions} == set(coco.imgs)
    assert len({caption["id"] for caption in captions}) == len(captions)
    assert [category["name"] for category in coco.cats.values()] == list(CATEGORY_NAMES)


def test_more_scenes_of_a_seed_begin_with_the_same_ones(folder: Path, tmp_path: Path) -> None:
    fewer = write_scenes(tmp_path, num_scenes=2, size=SIZE, seed=SEED)
    for path in (fewer / "images").iterdir():
        assert path.read_bytes() == (folder / "images" / path.name).read_bytes()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_scene_of_128_px_takes_less_than_30_ms() -> None:
    draw_scene(0, size=128, seed=0)
    start = time.process_time()
    for index in range(1, 21):
        draw_scene(index, size=128, seed=0)
    mean_ms = (time.process_time() - start) / 20 * 1000
    assert mean_ms < 30, f"{mean_ms:.1f} ms"


def test_an_empty_request_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0 and 64"):
        write_scenes(tmp_path, num_scenes=0, size=64, seed=0)
