"""What several unit tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.coco_dataset import Dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path)
