"""--help answers at once: the commands import nothing but Python's own modules and ours for it."""

from __future__ import annotations

import re
import sys

import pytest

from tests.commands import ROOT, run_typed

JYTHON = "org"  # which Python's own copy and pickle ask for in vain
OWN = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or path.is_dir()}


def imported_by(*arguments: str) -> tuple[set[str], str]:
    """Return the top-level modules that `python ARGUMENTS` imports, and what it prints."""
    code, stdout, stderr = run_typed(["-X", "importtime", *arguments])
    assert code == 0, stderr
    return {name.split(".")[0] for name in re.findall(r"\| +(\S+)$", stderr, re.M)}, stdout


@pytest.mark.parametrize("script", ["train_lightning.py", "infer.py"])
def test_help_imports_no_library(script: str) -> None:
    names, stdout = imported_by(script, "--help")
    assert stdout.startswith(f"usage: {script}")
    assert "inpainting" in names
    started_with, _ = imported_by("-c", "pass")
    assert names - started_with - OWN - {JYTHON} <= sys.stdlib_module_names


def test_a_library_would_be_seen() -> None:
    names, _ = imported_by("-c", "import PIL.Image")
    assert "PIL" in names - sys.stdlib_module_names
