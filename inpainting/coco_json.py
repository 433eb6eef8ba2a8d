"""Reading a COCO json table by table, row by row, and saying what a file is that is none.

Nothing here knows what a row means. What can be told from a file's first bytes and marks is told in
one line: a web page, a pointer, a list of results, half a download.

Terms: a *table* is one list of the file ("images", "annotations", "categories"), a *row* is one
entry of it. A *mark* is a character of JSON's grammar; *blanks* may stand around it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

_BLANK = re.compile(r"[ \t\n\r]*")
_FOREIGN_STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer. Fetch the file itself with `git lfs pull`."),
    (b"<", "an HTML or XML page. Download the file again."),
    (b"\x1f\x8b", "a gzip archive. Unpack it first."),
    (b"PK\x03\x04", "a zip archive. Unpack it first."),
)


class JsonTables:
    """One COCO json, whose tables are read row by row.

    The file's text is held, but never all of its Python objects: those of COCO's 448 MB would be
    some gigabytes. Each table is decoded once where the file has them in the order of reading.
    """

    def __init__(self, path: Path, *, flag: str) -> None:
        """Read the file and check that it can be a COCO json.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else than a json object.
        """
        self._path = path
        self._flag = flag
        self._text = _read_text(path, flag=flag)
        self._decode = json.JSONDecoder().raw_decode
        self._starts: dict[str, int] = {}  # where the value of each key met so far begins
        self._ends: dict[int, int] = {}  # where the value that begins here ends
        self._last_start = -1
        self._first = self._skip_blank(0)
        if self._mark(self._first) == "[":
            raise self.foreign("a bare list, as of detection results")
        if self._mark(self._first) != "{":
            raise self.foreign("something else than a json object")

    def foreign(self, what: str) -> ValueError:
        """Return the error that says what the file is instead of what its flag promises."""
        kind = "captions" if self._flag == "--caption_file" else "instances"
        return ValueError(
            f"{self._flag} must be a COCO {kind} json, got {what}: {self._path}. "
            f"Name a file like {kind}_train2017.json."
        )

    def has(self, table: str) -> bool:
        """Tell whether the file has this table; walks on through the file to find it."""
        while table not in self._starts:
            if not self._step():
                return False
        return True

    def rows(self, table: str) -> Iterator[object]:
        """Yield the rows of one table, each decoded when it is asked for.

        Raises:
            ValueError: if the file has no such table, or breaks off.
        """
        if not self.has(table):
            raise self.foreign(f'a json without "{table}"')
        start = self._starts[table]
        if self._mark(start) != "[":
            raise self.foreign(f'a json whose "{table}" is not a list')
        yield from self._rows_from(start)

    def finish(self) -> None:
        """Walk to the end of the file, so that one that was cut off is noticed.

        Raises:
            ValueError: if the file breaks off.
        """
        while self._step():
            pass

    def _step(self) -> bool:
        """Walk over the value of the last key to the value of the next; False at the end."""
        if self._last_start < 0:
            at = self._skip_blank(self._first + 1)
        else:
            at = self._skip_blank(self._end_of(self._last_start))
        if self._mark(at) == "}":
            return False
        if self._last_start >= 0:
            at = self._after(at, ",")
        key, at = self._value(at)
        self._last_start = self._after(self._skip_blank(at), ":")
        self._starts[str(key)] = self._last_start
        return True

    def _end_of(self, start: int) -> int:
        if start not in self._ends:
            if self._mark(start) == "[":
                for _ in self._rows_from(start):
                    pass
            else:
                self._ends[start] = self._value(start)[1]
        return self._ends[start]

    def _rows_from(self, start: int) -> Iterator[object]:
        at = self._skip_blank(start + 1)
        if self._mark(at) != "]":
            while True:
                row, at = self._value(at)
                yield row
                at = self._skip_blank(at)
                if self._mark(at) == "]":
                    break
                at = self._after(at, ",")
        self._ends[start] = at + 1

    def _value(self, at: int) -> tuple[object, int]:
        try:
            return self._decode(self._text, at)
        except (ValueError, RecursionError) as error:  # also integers of thousands of digits
            raise self._broken(getattr(error, "pos", at)) from error

    def _after(self, at: int, mark: str) -> int:
        if self._mark(at) != mark:
            raise self._broken(at)
        return self._skip_blank(at + 1)

    def _mark(self, at: int) -> str:
        return self._text[at : at + 1]

    def _skip_blank(self, at: int) -> int:
        match = _BLANK.match(self._text, at)
        assert match is not None
        return match.end()

    def _broken(self, at: int) -> ValueError:
        return ValueError(
            f"{self._flag} must be a whole json file, got {self._path}, which goes wrong or breaks "
            f"off at character {at} of {len(self._text)}. Download or export it again."
        )


def _read_text(path: Path, *, flag: str) -> str:
    """Return the text of a json file, in whichever Unicode encoding it is."""
    data = path.read_bytes()
    for start, what in _FOREIGN_STARTS:
        if data.startswith(start):
            raise ValueError(f"{flag} must be a json file, got {path}, which is {what}")
    if not data.strip():
        raise ValueError(
            f"{flag} must be a json file, got {path}, which is empty. Download it again."
        )
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{flag} must be a json file, got {path}, which is not text ({error.reason} at byte "
            f"{error.start}). Download it again."
        ) from error
