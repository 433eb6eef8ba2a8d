"""What several unit tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from model import Base
from tests import tiny
from tests.coco_dataset import Dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path)


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny.base()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy a base's folder, to be spoiled."""
    return Path(shutil.copytree(tiny.base_folder(), tmp_path / "my-base"))
