"""Files appear whole or not at all."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from inpainting.atomic import replace_atomically, write_text_atomically


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("earlier")

    def write_half() -> None:
        with replace_atomically(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_alone_in_its_folder_and_readable_for_all(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file"
    write_text_atomically(path, "空")
    write_text_atomically(path, "空の部屋")
    assert path.read_bytes() == "空の部屋".encode()
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
