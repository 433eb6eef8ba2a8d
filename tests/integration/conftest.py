"""What the integration tests share: drawn scenes and a tiny base, as flags of the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep indexes and demo pictures out of the user's cache. Set before anything is forked."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def pictures() -> list[str]:
    """The flags that name 12 drawn scenes of 64 px."""
    folder = tiny.coco_folder()
    return [
        "--image_dir", str(folder / "images"),
        "--ann_file", str(folder / "annotations" / "instances.json"),
        "--caption_file", str(folder / "annotations" / "captions.json"),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def flags(pictures: list[str]) -> list[str]:
    """The flags of a run of 5 short steps per epoch: 10 pictures train, 2 validate."""
    return [
        *pictures,
        "--pretrained_model_name_or_path", str(tiny.base_folder()),
        "--image_size", "64", "--batch_size", "2", "--num_workers", "0", "--val_split", "0.2",
        "--num_epochs", "1", "--learning_rate", "1e-3", "--accelerator", "cpu",
    ]  # fmt: skip


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """An --output_dir that doesn't exist yet."""
    return tmp_path / "outputs"
