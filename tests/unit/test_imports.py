"""Imports go down only. ALLOWED is the diagram in docs/architecture.md."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each module or package at the top, and what else of the project it may import.
_PARTS = {"inpainting"}
_MEETING = {"data", "model", "lightning_data", "lightning_module"}
_LIGHTNING = {
    "lightning_data", "lightning_module", "lightning_callbacks", "lightning_checkpoints",
    "lightning_faults", "lightning_trainer", "lightning_run",
}  # fmt: skip
ALLOWED: dict[str, set[str]] = {
    "inpainting": set(),
    "data": _PARTS,
    "data_check": _PARTS | {"data"},
    "model": _PARTS,
    "lightning_data": _PARTS | {"data"},
    "lightning_module": _PARTS | {"data", "model"},
    "lightning_callbacks": _PARTS | _MEETING,
    "lightning_checkpoints": _PARTS | _MEETING,
    "lightning_faults": _PARTS,
    "lightning_trainer": _PARTS
    | _MEETING
    | {"lightning_callbacks", "lightning_checkpoints", "lightning_faults"},
    "lightning_run": _PARTS | _MEETING | {"lightning_trainer", "lightning_checkpoints"},
    "train_lightning": _PARTS | {"data", "data_check", "model", "demo"} | _LIGHTNING,
    "pipeline": _PARTS | {"model"},
    "infer": _PARTS | {"model", "pipeline", "demo"},
    "tools": _PARTS | {"data", "model", "pipeline", "demo"} | _LIGHTNING,
    "demo": _PARTS | {"data", "model", "pipeline"} | _LIGHTNING,
    "benchmarks": _PARTS | {"data", "model", "pipeline", "demo", "train_lightning"} | _LIGHTNING,
}
# All that a command may ask of the demo: the data and base of somebody who names none.
COMMANDS = ("train_lightning", "infer")
DEMO_DOOR = "demo.defaults"
USES_LIGHTNING = {*_LIGHTNING, "train_lightning", "demo.train_base"}

# Asked for by a flag that is refused where they are missing.
OPTIONAL = {"bitsandbytes"}
# Distributions whose import name is another one.
DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless"}


def sources() -> list[Path]:
    """Return the project's modules, without its tests."""
    packages = [path for name in ALLOWED for path in sorted((ROOT / name).rglob("*.py"))]
    return sorted(ROOT.glob("*.py")) + packages


def module_name(path: Path) -> str:
    """Return the dotted name of a file: inpainting/masks.py -> inpainting.masks."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Yield every dotted name that a file imports, within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_project(name: str) -> str | None:
    """Return the project's module that a dotted name lies in: its longest prefix that is one."""
    modules = {module_name(path) for path in sources()}
    parts = name.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in modules), None)


def relative_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_module_has_its_place_in_the_diagram() -> None:
    tops = {module_name(path).split(".")[0] for path in sources()}
    assert tops <= ALLOWED.keys(), f"no place in ALLOWED: {tops - ALLOWED.keys()}"


@pytest.mark.parametrize("path", sources(), ids=relative_id)
def test_imports_go_down_only(path: Path) -> None:
    top = module_name(path).split(".")[0]
    imported = {name.split(".")[0] for name in imports(path)} & ALLOWED.keys()
    upward = imported - ALLOWED[top] - {top}
    assert not upward, f"{path.name} must not import {sorted(upward)}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_asks_the_demo_for_its_defaults_alone(name: str) -> None:
    names = [i for i in imports(ROOT / f"{name}.py") if i.split(".")[0] == "demo"]
    assert all(i.startswith(DEMO_DOOR) for i in names), names


@pytest.mark.parametrize("path", sources(), ids=relative_id)
def test_lightning_stays_in_the_lightning_files(path: Path) -> None:
    packages = {name.split(".")[0] for name in imports(path)}
    is_used = bool(packages & {"pytorch_lightning", "lightning", "lightning_fabric"})
    assert not is_used or module_name(path) in USES_LIGHTNING


def test_no_two_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for path in sources():
        name = module_name(path)
        graph[name] = {t for i in imports(path) if (t := of_project(i)) and t != name}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_every_imported_package_is_required() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    matches = [re.match(r"[\w-]+", line) for line in lines]
    required = {match[0].lower() for match in matches if match}
    imported = {name.split(".")[0]: path.name for path in sources() for name in imports(path)}
    foreign = imported.keys() - ALLOWED.keys() - sys.stdlib_module_names - OPTIONAL
    missing = {
        f"{name} ({imported[name]})"
        for name in foreign
        if DISTRIBUTIONS.get(name, name.replace("_", "-")).lower() not in required
    }
    assert not missing, f"not in requirements.txt: {sorted(missing)}"


@pytest.mark.parametrize("path", sources(), ids=relative_id)
def test_importing_a_module_does_nothing(path: Path) -> None:
    """At the top of a file stand a docstring, imports, definitions and values; no bare call."""
    plain = (
        ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign,
    )  # fmt: skip
    for number, node in enumerate(ast.parse(path.read_text(encoding="utf-8")).body):
        is_docstring = number == 0 and isinstance(node, ast.Expr)
        is_guard = isinstance(node, ast.If) and ast.unparse(node.test) in (
            "TYPE_CHECKING", "__name__ == '__main__'",
        )  # fmt: skip
        assert is_docstring or is_guard or isinstance(node, plain), (
            f"{path.name}:{node.lineno} runs at import: {ast.unparse(node)}"
        )
