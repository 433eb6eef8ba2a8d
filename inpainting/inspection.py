"""Which pictures can be read, and how many bad rows a run may have.

A start opens the index and tries some of the pictures; --check reads all of them, on all cores, and
writes down every fault that it finds in records and pictures.

Terms: a *fault* is a row that is left out, or a picture that can't be read. Its *kind* says what
must hold, "images: the file must ...", its *words* which row it is and what came instead.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from inpainting.atomic import replace_atomically
from inpainting.coco import CocoIndex
from inpainting.coco_records import Problem, ProblemLog, is_fault
from inpainting.runs import cache_dir, is_first_process

logger = logging.getLogger(__name__)

NUM_TRIED = 512  # pictures at each start: two or three seconds
PICTURES = "pictures"  # the table of the files, beside those of the json files
CRASHED = f"{PICTURES}: a file must not crash its decoder"
_SHOWN_CHARACTERS = 200  # of an example in the table


def open_index(
    args: argparse.Namespace, *, on_problem: Callable[[str, str], None] | None = None
) -> CocoIndex:
    """Read the records that the flags name, from the cache where it is up to date.

    Args:
        args: image_dir, ann_file and caption_file are looked at.
        on_problem: as `CocoIndex.from_annotations` takes it.

    Raises:
        FileNotFoundError, ValueError: as `CocoIndex.from_annotations`.
    """
    image_dir, cache = Path(args.image_dir), cache_dir() / "index"
    caption_file = Path(args.caption_file) if args.caption_file else None
    if args.ann_file:
        return CocoIndex.from_annotations(
            image_dir, ann_file=Path(args.ann_file), caption_file=caption_file, cache_dir=cache,
            on_problem=on_problem,
        )  # fmt: skip
    return CocoIndex.from_folder(
        image_dir, caption_file=caption_file, cache_dir=cache, on_problem=on_problem
    )


def open_training_data(args: argparse.Namespace) -> tuple[CocoIndex, list[int]]:
    """Read the records and try some pictures; say what is left out, and refuse too much of it.

    Args:
        args: what `open_index` looks at, and val_split, max_bad_fraction, strict_data.

    Returns:
        The index, and those of its rows whose pictures can't be read.

    Raises:
        FileNotFoundError, ValueError: as `open_index` and `check_bad_rows`, or there is nothing
            to split.
    """
    index = open_index(args)
    unreadable = try_pictures(index)
    if is_first_process():
        for kind, problem in index.problems.items():
            examples = ", ".join(problem.examples)
            logger.warning("warning: %d left out: %s (%s)", problem.count, kind, examples)
        for _, words in unreadable.values():
            logger.warning("left out: %s", words)
    check_bad_rows(
        index,
        unreadable=unreadable,
        max_bad_fraction=args.max_bad_fraction,
        is_strict=args.strict_data,
    )
    if len(index) < 2 and args.val_split > 0:
        raise ValueError(
            f"--image_dir must hold at least two pictures to split, got {len(index)}. "
            "Add pictures, or set --val_split 0."
        )
    return index, list(unreadable)


def picture_fault(index: CocoIndex, row: int) -> tuple[str, str] | None:
    """Read one picture wholly.

    Returns:
        None, or the fault's kind and its words.
    """
    try:
        index.open_picture(row)
    except (ValueError, OSError) as error:
        # Refusals read "<path> must ..., got ...": what stands before "got" is the kind.
        must = str(error).removeprefix(f"{index.image_path(row)} ").partition(", got ")[0]
        if isinstance(error, OSError) and error.strerror:
            must = f"the disk must let it be read ({error.strerror})"
        return f"{PICTURES}: a file {must}", _name(index, row, str(error))
    return None


def _name(index: CocoIndex, row: int, words: str) -> str:
    return f"id {int(index.image_ids[row])}: {words}"


def try_pictures(index: CocoIndex, *, num_tried: int = NUM_TRIED) -> dict[int, tuple[str, str]]:
    """Read some of the pictures, evenly spread, the same ones at each start.

    Returns:
        The fault of each row that can't be read.
    """
    rows = np.unique(np.linspace(0, len(index) - 1, min(num_tried, len(index))).astype(int))
    faults = {int(row): picture_fault(index, int(row)) for row in rows}
    return {row: fault for row, fault in faults.items() if fault is not None}


def check_bad_rows(
    index: CocoIndex,
    *,
    unreadable: Mapping[int, tuple[str, str]],
    max_bad_fraction: float,
    is_strict: bool,
    num_tried: int = NUM_TRIED,
) -> None:
    """Refuse data of which too much is bad.

    Args:
        index: the records, and what was left out of them.
        unreadable: what `try_pictures` found.
        max_bad_fraction: largest share of bad rows in each table, and of the tried pictures.
        is_strict: allow none at all.
        num_tried: how many pictures were.

    Raises:
        ValueError: says which table, how many, and the first of them.
    """
    tables: dict[str, tuple[int, str]] = {}  # number of bad rows, the first one
    for kind, problem in index.problems.items():
        if is_fault(kind):
            table = kind.partition(":")[0]
            count, first = tables.get(table, (0, problem.examples[0]))
            tables[table] = (count + problem.count, first)
    num_rows = {**index.num_rows_read, PICTURES: min(num_tried, len(index))}
    if unreadable:
        tables[PICTURES] = (len(unreadable), next(iter(unreadable.values()))[1])
    for table, (count, first) in tables.items():
        what = f"{count} of {num_rows[table]} {table} that can't be used ({first.rstrip('.')})"
        if is_strict:
            raise ValueError(
                f"--strict_data: every row must be sound, got {what}. --check shows all of them."
            )
        if count > max_bad_fraction * num_rows[table]:
            raise ValueError(
                f"at most {max_bad_fraction:.3g} of the {table} may be bad, got {what}. --check "
                "shows all of them; a greater --max_bad_fraction goes on without them."
            )


def num_cores() -> int:
    """Return how many cores this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def read_all(
    index: CocoIndex, *, num_processes: int
) -> Iterator[tuple[int, tuple[str, str] | None]]:
    """Read every picture, each process its share; yields row and fault in no order.

    A decoder that crashes takes its process with it: the picture that it was at is a fault, and
    another process goes on behind it.

    Raises:
        RuntimeError: a process ended for another reason.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    readers: dict[Connection, tuple[Any, range]] = {}

    def start(rows: range) -> None:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_read_share, args=(index, rows, sender), daemon=True)
        process.start()
        sender.close()  # so that the end of the process is the end of its pipe
        readers[receiver] = (process, rows)

    for first in range(min(num_processes, len(index))):
        start(range(first, len(index), num_processes))
    while readers:
        for receiver in wait(list(readers)):
            assert isinstance(receiver, Connection)
            process, rows = readers.pop(receiver)
            try:
                fault = receiver.recv()
            except EOFError:
                receiver.close()
                process.join()
                if not rows:
                    continue
                if process.exitcode >= 0:
                    raise RuntimeError(
                        f"a reader of pictures ended with {process.exitcode}"
                    ) from None
                words = f"{index.image_path(rows[0])}: signal {-process.exitcode}"
                yield rows[0], (CRASHED, _name(index, rows[0], words))
                if rows[1:]:
                    start(rows[1:])
            else:
                readers[receiver] = (process, rows[1:])
                yield rows[0], fault


def _read_share(index: CocoIndex, rows: range, sender: Connection) -> None:
    """Be a reader: send the fault of each row in turn, or None."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)  # end without a word, as the command does
    try:
        for row in rows:
            sender.send(picture_fault(index, row))
    except BrokenPipeError:  # the command is gone
        os._exit(0)


class FaultFile:
    """Writes faults into a json file as they come: there may be as many as there are rows.

    Attributes:
        log: counts them by kind and keeps the first of each.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._file.write('{"faults": [')
        self._separator = "\n"
        self.log = ProblemLog(on_problem=self._write)

    def _write(self, kind: str, words: str) -> None:
        fault = json.dumps({"kind": kind, "row": words}, ensure_ascii=True)
        self._file.write(f"{self._separator}{fault}")
        self._separator = ",\n"

    def finish(self, summary: Mapping[str, object]) -> None:
        """Write what else there is to say, and end the file."""
        self._file.write(f'\n],\n"summary": {json.dumps(summary, indent=1)}\n}}\n')


@contextmanager
def open_fault_file(path: Path) -> Iterator[FaultFile]:
    """Open the list of faults; the file appears whole, when the block succeeds."""
    with replace_atomically(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield FaultFile(file)


def format_table(kinds: Mapping[str, Problem], *, num_rows: Mapping[str, int]) -> str:
    """Return what --check prints: rows by table, then the kinds, the most frequent first."""
    bad = dict.fromkeys(num_rows, 0)
    for kind, problem in kinds.items():
        if is_fault(kind):
            bad[kind.partition(":")[0]] += problem.count
    lines = [f"{'':14}{'rows':>12}{'faults':>12}"]
    lines += [f"{table:14}{num_rows[table]:12,}{bad[table]:12,}" for table in num_rows]
    for kind, problem in sorted(kinds.items(), key=lambda item: -item[1].count):
        note = "" if is_fault(kind) else " (not used, no fault)"
        lines += ["", f"{problem.count:,} x {kind}{note}"]
        for example in problem.examples:
            short = " ".join(example.split())
            is_long = len(short) > _SHOWN_CHARACTERS
            lines.append(f"    {short[:_SHOWN_CHARACTERS]}{'...' if is_long else ''}")
    return "\n".join(lines)
