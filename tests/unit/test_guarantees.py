"""docs/guarantees.md: each promise names a test that exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guarantees.md"


def rows() -> list[tuple[str, list[str]]]:
    """Return each promise with the tests that it names."""
    lines = re.findall(r"^\| (?!promise|-)(.*) \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return [(promise, re.findall(r"`([^`]+)`", tests)) for promise, tests in lines]


@cache
def functions(path: Path) -> set[str]:
    """Return the names of a file's tests, those within classes too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_tests_that_exist() -> None:
    assert len(rows()) > 20
    for promise, tests in rows():
        assert tests, f"no test: {promise}"
        for test in tests:
            path, _, name = test.partition("::")
            assert (ROOT / path).is_file(), f"{promise}: no {path}"
            assert name.startswith("test_"), f"{promise}: {test}"
            assert name in functions(ROOT / path), f"{promise}: no {name} in {path}"


def test_no_line_of_a_table_is_passed_over() -> None:
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    heads = [line for line in lines if line.startswith(("| promise", "|---"))]
    assert len(lines) == len(heads) + len(rows())


def test_no_promise_stands_twice() -> None:
    named = [test for _, tests in rows() for test in tests]
    assert len(named) == len(set(named)), {test for test in named if named.count(test) > 1}
