"""The base's own training, at small size: its stages, and how it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from demo import train_base
from demo.defaults import BASE_DIR
from model import load_base

SMALL = ["--num_scenes", "32", "--vae_steps", "2", "--unet_steps", "2", "--accelerator", "cpu"]
PARTS = ("vae", "unet", "text_encoder")


def command(folder: Path) -> list[str]:
    return [str(folder / "base"), "--work_dir", str(folder / "work"), *SMALL]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that were trained, as they were begun."""
    begun: list[str] = []
    fit = train_base.fit

    def note(*args, name: str, **options) -> None:
        begun.append(name)
        fit(*args, name=name, **options)

    monkeypatch.setattr(train_base, "fit", note)
    return begun


def test_the_command_makes_a_base_and_goes_on_where_it_was_stopped(
    stages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(train_base.DiffusionTraining, "training_step", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            train_base.main(command(tmp_path))
    assert not (tmp_path / "base").exists(), "an unfinished base"
    assert train_base.main(command(tmp_path)) == 0
    assert stages == ["vae", "unet", "unet"]
    assert train_base.main(command(tmp_path)) == 0
    assert stages == ["vae", "unet", "unet"], "what is done isn't done again"

    base = load_base(str(tmp_path / "base"))
    assert (base.image_size, base.stride) == (64, 4)
    assert (tmp_path / "base" / "training.log").is_file()
    for part in PARTS:
        (weights,) = (tmp_path / "base" / part).glob("*.safetensors")
        with safe_open(weights, "pt") as file:
            dtypes = {file.get_slice(n).get_dtype() for n in file.keys()}  # noqa: SIM118 - no dict
        assert dtypes == {"F16"}, part


def test_the_projects_base_is_what_the_script_makes_and_small() -> None:
    base = load_base(str(BASE_DIR))
    assert base.unet.config["block_out_channels"] == list(train_base.UNET_CHANNELS)
    assert base.vae.config["block_out_channels"] == list(train_base.VAE_CHANNELS)
    assert base.noise_scheduler.config["prediction_type"] == "v_prediction"
    sizes = [path.stat().st_size for path in BASE_DIR.rglob("*") if path.is_file()]
    assert max(sizes) < 16e6
    assert sum(sizes) < 18e6
