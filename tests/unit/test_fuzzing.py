"""Whatever stands in a json or a picture file: it is understood or refused, and nothing else.

A hundred cases of each kind each time, the same ones; 10,000 new ones in `make soak`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from inpainting.coco_build import build_contents, unpack_captions, unpack_masks
from inpainting.coco_records import (
    BadRecordError,
    Picture,
    compress,
    parse_caption,
    parse_category,
    parse_instance,
    parse_picture,
)
from inpainting.images import FORMATS, read_image, read_layers, read_mask

FEW = settings(
    max_examples=100,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=10_000, derandomize=False)
few_and_many = pytest.mark.parametrize(
    "fuzz",
    [
        pytest.param(FEW, id="few"),
        pytest.param(MANY, id="many", marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    ],
)

HEIGHT, WIDTH = 6, 8
NUM_PIXELS = HEIGHT * WIDTH


def attempt(
    function: Callable[..., Any],
    *arguments: Any,
    refusals: tuple[type[Exception], ...] = (ValueError, FileNotFoundError),
    **options: Any,
) -> tuple[Any, str]:
    """Return what a function answers, and in which words it refuses: "" where it doesn't."""
    try:
        return function(*arguments, **options), ""
    except refusals as error:
        return None, str(error)


ROW_REFUSALS = (BadRecordError,)  # a plain ValueError would end the reading of the file


# ---- records

odd_numbers = st.sampled_from(
    [0, 1, -1, 3, 7.5, 1e9, -1e9, 1e300, float("nan"), float("inf"), -float("inf"), 2**31, 2**32,
     2**63, -(2**63), 10**400, 0.0, -0.0, 5e-324, True, False]
)  # fmt: skip
numbers = st.floats(-10, 20, width=32) | st.integers(-3, 12) | odd_numbers
texts = st.text(max_size=8) | st.sampled_from(
    ["", " \n", "\ud800", "\0", "\U0001f600", "<|endoftext|>", "a.jpg", "../a.jpg", "/a.jpg",
     "C:\\a.jpg", "sub/a.jpg", "9", "word " * 500]
)  # fmt: skip
leaves = st.none() | st.booleans() | numbers | texts
json_values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
polygons = st.lists(st.lists(st.floats(-8, 16), min_size=6, max_size=12), min_size=1, max_size=3)


@st.composite
def runs(draw: Callable[..., Any]) -> list[int]:
    """Draw run lengths that add up to the picture."""
    edges = sorted(draw(st.lists(st.integers(0, NUM_PIXELS), max_size=9)))
    return np.diff([0, *edges, NUM_PIXELS]).tolist()


@st.composite
def compressed(draw: Callable[..., Any]) -> str:
    """Draw the compressed text of such run lengths, sometimes spoilt."""
    rle = {"size": [HEIGHT, WIDTH], "counts": draw(runs())}
    text = coco_mask.frPyObjects(cast(Any, rle), HEIGHT, WIDTH)["counts"].decode()
    at = draw(st.integers(0, len(text)))
    kind = draw(st.sampled_from(["as it is", "cut", "longer", "changed"]))
    letter = draw(st.characters(min_codepoint=40, max_codepoint=120))
    return {
        "as it is": text, "cut": text[:at], "longer": text[:at] + letter + text[at:],
        "changed": text[:at] + letter + text[at + 1 :],
    }[kind]  # fmt: skip


sizes = st.sampled_from([[HEIGHT, WIDTH], [WIDTH, HEIGHT], [HEIGHT, WIDTH, 1], None, "6x8"])
counts = runs() | compressed() | st.lists(st.integers(-9, 60), max_size=9) | json_values
rles = st.fixed_dictionaries({"size": sizes | json_values, "counts": counts})
sound_rles = st.fixed_dictionaries(
    {"size": st.just([HEIGHT, WIDTH]), "counts": runs() | compressed()}
)
segmentations = (
    polygons
    | sound_rles
    | rles
    | st.lists(st.lists(numbers, max_size=12), max_size=3)
    | json_values
)


def expand(runs: list[int]) -> np.ndarray:
    """Draw run lengths without pycocotools."""
    values = np.repeat(np.arange(len(runs)) % 2, runs).astype(np.uint8)
    return values.reshape((HEIGHT, WIDTH), order="F")


def read_text(text: str) -> list[int]:
    """Read compressed run lengths letter by letter."""
    found: list[int] = []
    at = 0
    while at < len(text):
        number, shift, goes_on = 0, 0, True
        while goes_on:
            digit = ord(text[at]) - 48
            number |= (digit & 0x1F) << shift
            shift, at, goes_on = shift + 5, at + 1, bool(digit & 0x20)
            if not goes_on and digit & 0x10:
                number -= 1 << shift
        found.append(number + (found[-2] if len(found) > 2 else 0))
    return found


@few_and_many
def test_every_segmentation_is_a_mask_of_its_picture_or_refused(fuzz: settings) -> None:
    @fuzz
    @given(segmentations)
    @example({"size": [HEIGHT, WIDTH], "counts": "8"})  # falls short: few examples may not meet it
    def check(segmentation: object) -> None:
        kept, refusal = attempt(
            compress, segmentation, height=HEIGHT, width=WIDTH, refusals=ROW_REFUSALS
        )
        if refusal:
            assert "\n" not in refusal
            assert len(refusal) < 400
            return
        mask = coco_mask.decode({"size": [HEIGHT, WIDTH], "counts": kept})
        assert mask.shape == (HEIGHT, WIDTH)
        assert mask.max() <= 1
        if isinstance(segmentation, dict):
            written = segmentation["counts"]
            lengths = read_text(written) if isinstance(written, str) else written
            np.testing.assert_array_equal(mask, expand(lengths))

    check()


keys = st.sampled_from(
    ["id", "image_id", "category_id", "iscrowd", "segmentation", "file_name", "height", "width",
     "name", "caption", "area", "bbox"]
)  # fmt: skip
ids = st.sampled_from([0, 1, 9, 77]) | leaves
image_rows = st.fixed_dictionaries(
    {"id": ids, "file_name": st.just("a.jpg") | texts, "height": st.just(HEIGHT) | numbers,
     "width": st.just(WIDTH) | numbers}
)  # fmt: skip
annotation_rows = st.fixed_dictionaries(
    {"id": ids, "image_id": ids, "category_id": ids, "segmentation": segmentations},
    optional={"iscrowd": st.sampled_from([0, 1]) | leaves},
)
category_rows = st.fixed_dictionaries({"id": ids, "name": texts})
caption_rows = st.fixed_dictionaries({"id": ids, "image_id": ids, "caption": texts | leaves})
odd_rows = st.dictionaries(keys, json_values, max_size=6) | json_values


@few_and_many
def test_every_row_is_understood_or_refused(fuzz: settings) -> None:
    @fuzz
    @given(image_rows | annotation_rows | category_rows | caption_rows | odd_rows)
    @example({"id": 1, "image_id": 0, "category_id": 1, "segmentation": [[10**400] * 6]})
    def check(row: object) -> None:
        pictures = {0: Picture(0, "a.jpg", HEIGHT, WIDTH), 1: None}
        for parse in (
            parse_picture,
            parse_category,
            parse_caption,
            lambda row: parse_instance(row, cast(Any, pictures)),
        ):
            _, refusal = attempt(parse, row, refusals=ROW_REFUSALS)
            assert len(refusal) < 400

    check()


def table(rows: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(rows | odd_rows, max_size=5)


@st.composite
def files(draw: Callable[..., Any], tables: dict[str, st.SearchStrategy[Any]]) -> bytes:
    """Draw a json file: sound or odd rows, whole or spoilt text, any encoding."""
    content = {name: draw(table(rows)) for name, rows in tables.items()}
    if draw(st.booleans()):
        content["images"] = [
            {"id": 9, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH},
            *content["images"],
        ]
    content |= draw(st.dictionaries(texts | keys, json_values, max_size=2))
    encoding = draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32"]))
    data = json.dumps(content, ensure_ascii=draw(st.booleans())).encode(encoding, "replace")
    return draw(st.just(data) | spoilt(data))


@st.composite
def spoilt(draw: Callable[..., Any], data: bytes) -> bytes:
    """Draw damage: a cut, changed bytes, foreign bytes put in or in front."""
    kind = draw(st.sampled_from(["cut", "changed", "put in", "in front"]))
    at = draw(st.integers(0, len(data)))
    foreign = draw(st.binary(min_size=1, max_size=12))
    if kind == "cut":
        return data[:at]
    if kind == "in front":
        return foreign + data
    if kind == "put in":
        return data[:at] + foreign + data[at:]
    damaged = bytearray(data)
    for position, value in draw(
        st.lists(st.tuples(st.integers(0, max(len(data) - 1, 0)), st.integers(0, 255)), max_size=8)
    ):
        if damaged:
            damaged[position] = value
    return bytes(damaged)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold one picture, and the json files and pictures that are being tried."""
    folder = tmp_path_factory.mktemp("fuzzing")
    (folder / "images" / "sub").mkdir(parents=True)
    (folder / "images" / "a.jpg").touch()
    return folder


@few_and_many
def test_every_json_makes_an_index_or_is_refused_in_one_line(folder: Path, fuzz: settings) -> None:
    @fuzz
    @given(
        files({"images": image_rows, "annotations": annotation_rows, "categories": category_rows}),
        st.none() | files({"images": image_rows, "annotations": caption_rows}),
        st.booleans(),
    )
    def check(instances: bytes, captions: bytes | None, has_ann_file: bool) -> None:
        (folder / "instances.json").write_bytes(instances)
        (folder / "captions.json").write_bytes(captions or b"")
        told: list[tuple[str, str]] = []
        contents, refusal = attempt(
            build_contents,
            folder / "images",
            ann_file=folder / "instances.json" if has_ann_file else None,
            caption_file=None if captions is None else folder / "captions.json",
            on_problem=lambda kind, words: told.append((kind, words)),
        )
        if refusal:
            assert "\n" not in refusal
            assert refusal.startswith(("--ann_file", "--caption_file", "--image_dir"))
            return
        arrays = contents["arrays"]
        num_pictures = len(arrays["image_ids"])
        assert num_pictures > 0
        assert (np.diff(arrays["image_ids"]) > 0).all()
        assert len(arrays["sizes"]) == num_pictures
        for kind in ("record", "masks", "captions"):
            starts = arrays[f"{kind}_starts"]
            assert len(starts) == num_pictures + 1
            assert (np.diff(starts) >= 0).all()
        for kind, unpack in (("masks", unpack_masks), ("captions", unpack_captions)):
            packed = arrays[f"{kind}_bytes"].tobytes()
            for start, stop in pairwise(arrays[f"{kind}_starts"].tolist()):
                assert all(unpack(packed[start:stop])), "none is empty"
        # Each row is used, told, or one of a picture that was.
        assert len(told) == sum(problem.count for problem in contents["problems"].values())
        for name, used in (("images", num_pictures), ("annotations", arrays["record_starts"][-1])):
            bad = sum(p.count for k, p in contents["problems"].items() if k.startswith(f"{name}:"))
            assert used + bad <= contents["num_rows_read"].get(name, 0)
        assert json.dumps(contents["problems"], default=str)

    check()


# ---- pictures


@cache
def sound_files() -> dict[str, bytes]:
    """Return small pictures in every format, with what such files carry."""
    y, x = np.mgrid[:13, :17]
    rgb = np.stack([15 * x, 19 * y, 128 + x - y], axis=-1).astype(np.uint8)
    picture = Image.fromarray(rgb)
    mask = Image.fromarray(((x > 8) * np.uint8(255)).astype(np.uint8))
    clear = picture.convert("RGBA")
    clear.putalpha(mask)
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = picture.quantize(16)
    found = {}

    def keep(name: str, image: Image.Image, kind: str, **options: Any) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found[name] = buffer.getvalue()

    keep("jpg", picture, "JPEG", exif=exif)
    keep("progressive jpg", picture, "JPEG", progressive=True)
    keep("cmyk jpg", picture.convert("CMYK"), "JPEG")
    keep("png", picture, "PNG", exif=exif, icc_profile=b"profile" * 9)
    keep("rgba png", clear, "PNG")
    keep("mask png", mask, "PNG")
    keep("1-bit png", mask.convert("1"), "PNG", transparency=0)
    keep("grey png", picture.convert("L"), "PNG", transparency=40)
    keep("rgb png with a transparent colour", picture, "PNG", transparency=(0, 0, 128))
    keep("palette png", palette, "PNG", transparency=bytes(range(0, 160, 10)))
    keep("16-bit png", Image.fromarray((x * 3000).astype(np.uint16)), "PNG", transparency=3000)
    keep("animated png", picture, "PNG", save_all=True, append_images=[clear.convert("RGB")])
    keep("gif", palette, "GIF", transparency=3)
    keep("animated gif", palette, "GIF", save_all=True, append_images=[mask.convert("P")])
    keep("webp", clear, "WEBP", exif=exif)
    keep("bmp", picture, "BMP")
    keep("tif", picture, "TIFF", compression="tiff_lzw", exif=exif)
    keep("deep tif", Image.fromarray((x * 70000).astype(np.int32)), "TIFF")
    keep("float tif", Image.fromarray((x * 0.5).astype(np.float32)), "TIFF")
    keep("pgm", mask, "PPM")
    keep("jp2", picture, "JPEG2000")
    keep("avif", picture, "AVIF")
    return found


def test_the_files_to_spoil_are_of_every_format() -> None:
    kinds = {Image.open(io.BytesIO(data)).format for data in sound_files().values()}
    assert kinds == set(FORMATS)


def png_of_a_shorter_chunk() -> bytes:
    """Return a PNG whose pixels are said to be of another length: to Pillow a SyntaxError."""
    data = bytearray(sound_files()["png"])
    data[data.index(b"IDAT") - 1] ^= 8
    return bytes(data)


@st.composite
def picture_files(draw: Callable[..., Any]) -> bytes:
    """Draw a picture file with damage, mostly where its description stands."""
    data = draw(st.sampled_from(sorted(sound_files().values())))
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            cut = min(len(data), 120)
            data = draw(spoilt(data[:cut])) + data[cut:]
        else:
            data = draw(spoilt(data))
    if draw(st.integers(0, 5)) == 0:
        other = draw(st.sampled_from(sorted(sound_files().values())))
        at = draw(st.integers(0, min(len(data), len(other))))
        data = data[:at] + other[at:]
    return data


@few_and_many
def test_every_picture_file_is_read_or_refused_in_one_line(folder: Path, fuzz: settings) -> None:
    @fuzz
    @given(picture_files() | st.binary(max_size=64))
    @example(png_of_a_shorter_chunk())
    def check(data: bytes) -> None:
        path = folder / "picture.png"
        path.write_bytes(data)
        answers: dict[str, Any] = {}
        for read in (read_image, read_layers, read_mask):
            answer, refusal = attempt(read, path)
            if refusal:
                assert refusal.startswith(f"{path} must ")
                assert "\n" not in refusal
            else:
                answers[read.__name__] = answer
        assert ("read_image" in answers) == ("read_layers" in answers)
        if "read_image" in answers:
            image, layers = answers["read_image"], answers["read_layers"]
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            np.testing.assert_array_equal(layers.image, image)
            if layers.transparent is not None:
                assert layers.transparent.shape == (*image.shape[:2], 4)
        if "read_mask" in answers:
            assert set(np.unique(answers["read_mask"])) == {0, 1}
            assert answers["read_mask"].shape == answers["read_image"].shape[:2]

    check()
