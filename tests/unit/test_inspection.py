"""Which pictures can be read, and how many bad rows a run may have."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inpainting import inspection
from inpainting.coco import CocoIndex
from inpainting.coco_records import NUM_EXAMPLES, Problem
from inpainting.contact_sheet import CELL_PX, MARK, SheetRow, draw_contact_sheet
from inpainting.inspection import (
    FaultFile,
    check_bad_rows,
    format_table,
    num_cores,
    open_fault_file,
    picture_fault,
    read_all,
    try_pictures,
)

NUM_PICTURES = 20


@pytest.fixture
def index(tmp_path: Path) -> CocoIndex:
    """Twenty pictures with ids 0 to 19, and nothing wrong with them."""
    (tmp_path / "images").mkdir()
    for number in range(NUM_PICTURES):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / "images" / f"{number:012d}.png")
    images = [
        {"id": i, "file_name": f"{i:012d}.png", "height": 6, "width": 8}
        for i in range(NUM_PICTURES)
    ]
    content = {"images": images, "annotations": [], "categories": []}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return open_index(tmp_path)


def open_index(folder: Path) -> CocoIndex:
    return CocoIndex.from_annotations(
        folder / "images", ann_file=folder / "instances.json", cache_dir=folder / "cache"
    )


def spoil(index: CocoIndex, row: int, content: bytes = b"") -> None:
    index.image_path(row).write_bytes(content)


# Reading


def test_a_sound_picture_has_no_fault(index: CocoIndex) -> None:
    assert picture_fault(index, 0) is None


def test_a_fault_has_a_kind_of_its_own_and_names_its_picture(index: CocoIndex) -> None:
    spoil(index, 3)
    spoil(index, 4, b"<html>")
    Image.new("RGB", (6, 8)).save(index.image_path(5))
    index.image_path(6).unlink()
    faults = {row: picture_fault(index, row) for row in (3, 4, 5, 6)}
    kinds = {row: fault[0] for row, fault in faults.items() if fault}
    assert kinds[3] == kinds[4] != kinds[5]
    assert kinds[3].startswith("pictures: a file must be a whole picture of format JPEG, PNG")
    assert kinds[5] == "pictures: a file must have the size in its record"
    assert kinds[6] == "pictures: a file must exist"
    for row, fault in faults.items():
        assert fault
        assert fault[1].startswith(f"id {row}: {index.image_path(row)} must")
        assert str(row) not in fault[0], "a kind that names a picture is none"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_picture_that_may_not_be_read_has_the_disks_reason(index: CocoIndex) -> None:
    index.image_path(3).chmod(0)
    fault = picture_fault(index, 3)
    assert fault
    assert fault[0] == "pictures: a file the disk must let it be read (Permission denied)"


def test_the_pictures_that_a_start_tries_are_spread_evenly(
    index: CocoIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    monkeypatch.setattr(
        inspection, "picture_fault", lambda _, row: (tried.append(row), ("kind", "words"))[1]
    )
    assert list(try_pictures(index, num_tried=3)) == tried == [0, 9, 19]
    tried.clear()
    assert list(try_pictures(index)) == tried == list(range(NUM_PICTURES))


@pytest.mark.parametrize("num_processes", [1, 3, 64])
def test_every_picture_is_read_once_by_any_number_of_processes(
    index: CocoIndex, num_processes: int
) -> None:
    for row in (2, 7, 19):
        spoil(index, row)
    readings = list(read_all(index, num_processes=num_processes))
    assert sorted(row for row, _ in readings) == list(range(NUM_PICTURES))
    assert sorted(row for row, fault in readings if fault) == [2, 7, 19]
    assert dict(readings)[7] == picture_fault(index, 7)


class CrashingIndex(CocoIndex):
    """Kills its reader at some pictures, as a decoder's segmentation fault does."""

    def open_picture(self, row: int) -> Image.Image:
        if row in (0, 3, 19):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().open_picture(row)


def test_a_crashing_decoder_costs_one_picture(index: CocoIndex) -> None:
    crashing = CrashingIndex(index._folder, image_dir=index.image_dir)
    faults = dict(read_all(crashing, num_processes=2))
    assert len(faults) == NUM_PICTURES
    assert {row for row, fault in faults.items() if fault} == {0, 3, 19}
    assert faults[3] == (inspection.CRASHED, f"id 3: {index.image_path(3)}: signal 11")


class FailingIndex(CocoIndex):
    def open_picture(self, row: int) -> Image.Image:
        raise ZeroDivisionError("a fault of ours")


def test_a_fault_of_ours_in_a_reader_is_no_fault_of_the_picture(index: CocoIndex) -> None:
    failing = FailingIndex(index._folder, image_dir=index.image_dir)
    with pytest.raises(RuntimeError, match="a reader of pictures ended with 1"):
        list(read_all(failing, num_processes=1))


def test_there_is_at_least_one_core() -> None:
    assert num_cores() >= 1


# How much may be bad


def judge(
    index: CocoIndex, *, bad: int = 0, max_bad_fraction: float = 0.01, is_strict: bool = False
) -> None:
    check_bad_rows(
        index,
        unreadable={row: ("pictures: kind", f"id {row}: words") for row in range(bad)},
        max_bad_fraction=max_bad_fraction,
        is_strict=is_strict,
    )


def test_sound_data_pass_however_strict(index: CocoIndex) -> None:
    judge(index, max_bad_fraction=0.0, is_strict=True)


def test_a_share_of_unreadable_pictures_above_the_limit_is_refused(index: CocoIndex) -> None:
    judge(index, bad=2, max_bad_fraction=0.1)
    with pytest.raises(ValueError, match=r"at most 0\.1 of the pictures may be bad, got 3 of 20"):
        judge(index, bad=3, max_bad_fraction=0.1)
    with pytest.raises(ValueError, match=r"can't be used \(id 0: words\)\. --check shows"):
        judge(index, bad=1)


def test_a_share_of_bad_rows_above_the_limit_is_refused(index: CocoIndex) -> None:
    index.problems = {
        "images: one": Problem(count=1, examples=("row 5, id 'x': one",)),
        "images: two": Problem(count=1, examples=("row 6, id 'y': two",)),
    }
    judge(index, max_bad_fraction=0.1)
    with pytest.raises(ValueError, match=r"0\.09 of the images may be bad, got 2 of 20 .*row 5"):
        judge(index, max_bad_fraction=0.09)
    with pytest.raises(ValueError, match=r"--strict_data: every row must be sound, got 2 of 20"):
        judge(index, max_bad_fraction=1.0, is_strict=True)


def test_captions_of_other_pictures_are_no_fault(dataset) -> None:
    content = json.loads(dataset.caption_file.read_text())
    content["annotations"] += [
        {"id": 100 + i, "image_id": 1000 + i, "caption": "elsewhere"} for i in range(50)
    ]
    dataset.caption_file.write_text(json.dumps(content))
    index = dataset.index()
    ((kind, problem),) = index.problems.items()
    assert problem.count == 50
    judge(index, max_bad_fraction=0.0, is_strict=True)
    assert f"50 x {kind} (not used, no fault)" in format_table(
        index.problems, num_rows=index.num_rows_read
    )


# The report


def test_the_file_of_faults_holds_all_of_them_and_the_log_the_first(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    words = [f'row {i}, id "{i}": 空の\u2028\\ "quoted"' for i in range(NUM_EXAMPLES + 3)]
    with open_fault_file(path) as faults:
        for line in words:
            faults.log.add_words("images: kind", line)
        faults.finish({"num_rows": {"images": 9}})
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["faults"] == [{"kind": "images: kind", "row": line} for line in words]
    assert content["summary"] == {"num_rows": {"images": 9}}
    assert faults.log.kinds == {
        "images: kind": Problem(count=len(words), examples=tuple(words[:NUM_EXAMPLES]))
    }


def test_a_file_without_faults_is_json_too() -> None:
    file = io.StringIO()
    FaultFile(file).finish({})
    assert json.loads(file.getvalue()) == {"faults": [], "summary": {}}


def test_every_bad_row_is_told_not_only_the_first_examples(dataset) -> None:
    content = json.loads(dataset.ann_file.read_text())
    content["annotations"] += [{"id": None}] * 40
    dataset.ann_file.write_text(json.dumps(content))
    dataset.index()  # so that there is a cache that could be taken
    told: list[tuple[str, str]] = []
    CocoIndex.from_annotations(
        dataset.image_dir,
        ann_file=dataset.ann_file,
        cache_dir=dataset.cache_dir,
        on_problem=lambda kind, words: told.append((kind, words)),
    )
    assert len(told) == 40
    assert told[39][1].startswith("row 42, id None: ")
    assert len(list(dataset.cache_dir.iterdir())) == 2  # with and without captions


def test_the_table_tells_the_most_frequent_kind_first() -> None:
    kinds = {
        "images: a": Problem(count=1, examples=("row 1: " + "long " * 100,)),
        "annotations: b": Problem(count=1200, examples=("row 2: b\nb", "row 3: b")),
    }
    assert format_table(kinds, num_rows={"images": 20, "annotations": 5000}) == "\n".join(
        [
            "                      rows      faults",
            "images                  20           1",
            "annotations          5,000       1,200",
            "",
            "1,200 x annotations: b",
            "    row 2: b b",
            "    row 3: b",
            "",
            "1 x images: a",
            "    row 1: " + ("long " * 100)[:193] + "...",
        ]
    )


def test_the_sheet_shows_picture_hole_what_is_seen_and_prompt() -> None:
    image = np.full((16, 16, 3), 200, np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :8] = 1
    seen = np.full((3, 16, 16), 200 / 255, np.float32)
    seen[:, mask == 1] = -1
    rows = [SheetRow(image, mask, seen, f"id {i}", "words " * 200 * i) for i in range(3)]
    sheet = np.asarray(draw_contact_sheet(rows))
    top = sheet.shape[0] - CELL_PX
    assert sheet[top + 4, 4].tolist() == [200, 200, 200]
    left = CELL_PX + 8
    assert [sheet[top + 4, left + x].tolist() for x in (4, CELL_PX - 12)] == [[255] * 3, [0] * 3]
    assert [sheet[top + 4, 2 * left + x].tolist() for x in (4, CELL_PX - 12)] == [
        list(MARK), [200] * 3,
    ]  # fmt: skip
    assert (sheet[top:, 3 * left :] < 128).any(), "no words"
