"""Json files: every order and encoding is read, what is none is named."""

from __future__ import annotations

import json

import pytest

from tests.coco_dataset import Dataset, captions, instances


def test_the_order_of_the_tables_in_the_file_does_not_matter(dataset: Dataset) -> None:
    content = instances()
    reference = [dict(rle) for rle in dataset.index(content).object_masks(1)]
    turned = {"info": {"a": [1, {"b": "]"}]}, **dict(reversed(content.items())), "empty": []}
    index = dataset.index(turned)
    assert [dict(rle) for rle in index.object_masks(1)] == reference
    assert index.category_names(1) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "which is empty"),
        (b" \n ", "which is empty"),
        (b"<!DOCTYPE html><html>404</html>", "which is an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "gzip archive"),
        (b"PK\x03\x04\x00", "zip archive"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "which is not text"),
        (b'[{"image_id": 1, "score": 0.5}]', "a bare list, as of detection results"),
        (b'"text"', "something else than a json object"),
        (b"{}", 'a json without "images"'),
        (b'{"images": {}, "annotations": []}', '"images" is not a list'),
        (b'{"images": [], "annotations": [], "categories": []}', "no usable picture"),
        (b'{"images": [}', "breaks off at character 12"),
        (b'{"images": [1 2]}', "breaks off at character 14"),
        (b'{"images" []}', "breaks off"),
        (b'{"info": ' + b"[" * 100_000, "breaks off"),
        (b'{"info": ' + b"9" * 10_000 + b"}", "breaks off"),
    ],
)
def test_a_file_that_is_no_instances_json_is_named(
    dataset: Dataset, content: bytes, message: str
) -> None:
    dataset.ann_file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        dataset.index()
    assert str(raised.value).startswith("--ann_file must be a")
    assert str(dataset.ann_file) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["ann", "caption"])
def test_a_file_that_was_cut_off_anywhere_is_refused(dataset: Dataset, kind: str) -> None:
    path = getattr(dataset, f"{kind}_file")
    whole = path.read_bytes()
    for length in range(len(whole) - 1, 0, -7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"--{kind}_file must be"):
            dataset.index()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_every_unicode_encoding_of_json_is_read(dataset: Dataset, encoding: str) -> None:
    text = json.dumps(captions(), ensure_ascii=False)
    dataset.caption_file.write_bytes(text.encode(encoding))
    assert dataset.index().captions(0) == ["空の部屋 \U0001f600"]
