"""Which bases can be trained on is decided by their configurations, before weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from demo.random_base import write_random_base
from inpainting import base
from inpainting.base import read_base_config
from tests import tiny

WEIGHTS = Path(__file__).parents[3] / "shared" / "weights"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Copy a base's configurations: there are no weights that could be read."""
    copy = tmp_path / "my-base"
    shutil.copytree(
        tiny.base_folder(), copy, ignore=shutil.ignore_patterns("*.safetensors", "*.bin")
    )
    assert not list(copy.glob("*/*.safetensors"))
    return copy


def change(folder: Path, file: str, **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(name: str | Path, **arguments: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError), match=r"got|needs ") as error:
        read_base_config(str(name), **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_says_what_it_is_without_its_weights(folder) -> None:
    config = read_base_config(str(folder))
    assert (config.name, config.stride, config.image_size) == ("my-base", 8, 64)
    assert (config.prediction_type, config.single_file) == ("epsilon", None)


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_the_stride_is_counted_from_the_vaes_blocks(tmp_path, stride) -> None:
    config = read_base_config(str(write_random_base(tmp_path, stride=stride)))
    assert (config.stride, config.size_multiple, config.image_size) == (stride, stride, 64)


def test_a_name_is_never_a_local_path(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    assert read_base_config(".").name == "my-base"


def test_a_scheduler_that_says_nothing_predicts_epsilon(folder) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["prediction_type"]
    path.write_text(json.dumps(config))
    assert read_base_config(str(folder)).prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, "must take 4 channels, got 9: this is an inpaint"),
        ("unet/config.json", {"in_channels": 8}, "must have 4 latent channels, got 8 and 4"),
        ("vae/config.json", {"latent_channels": 16}, "must have 4 latent channels, got 4 and 16"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "got SDXL (my-base)"),
        ("unet/config.json", {"_class_name": "UNetMotionModel"}, "got UNetMotionModel"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "must not be class-conditioned"),
        ("unet/config.json", {"num_class_embeds": 1000}, "must not be class-conditioned"),
        ("unet/config.json", {"cross_attention_dim": 768}, "got 768 and 32. These config"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "got sample"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "got flow_"),
    ],
)
def test_other_bases_are_refused_in_one_line_by_their_configuration(
    folder, file, changes, message
) -> None:
    change(folder, file, **changes)
    assert message in refusal(folder)


def test_sdxl_is_known_by_its_second_text_encoder(folder) -> None:
    (folder / "text_encoder_2").mkdir()
    assert "got SDXL" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "line"), [("sd15_configs", None), ("sd15_inpainting_configs", "got 9")]
)
def test_the_real_configurations_are_told_apart(name, line) -> None:
    folder = WEIGHTS / name
    if not folder.is_dir():
        pytest.skip("needs Stable Diffusion's configurations")
    if line:
        assert line in refusal(folder)
    else:
        config = read_base_config(str(folder))
        assert (config.stride, config.image_size, config.prediction_type) == (8, 512, "epsilon")


@pytest.mark.parametrize(
    "file",
    [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_or_broken_configuration_is_named(folder, file) -> None:
    (folder / file).write_text("{")
    assert f"{folder / file} must be JSON" in refusal(folder)
    (folder / file).write_text("[]")
    assert f"{folder / file} must hold a JSON object, got list" in refusal(folder)
    (folder / file).unlink()
    assert f"a base must hold {file}, got none in {folder}" in refusal(folder)


@pytest.mark.parametrize(
    ("part", "key"), [(part, key) for part, keys in base.NEEDED_ENTRIES.items() for key in keys]
)
def test_a_configuration_without_a_needed_entry_is_refused(folder, part, key) -> None:
    file = f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"
    change(folder, file, **{key: None})
    assert f"{file} must say" in refusal(folder)
    assert f"got no {key}." in refusal(folder)


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "nothing", "a/b/c", "~/base"])
def test_a_path_that_doesnt_exist_is_not_looked_up_on_the_hub(name, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    assert f"got {name}. Check the path." in refusal(name)


def test_a_hub_id_that_cant_be_reached_is_refused_in_one_line(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    line = refusal("somebody/stable-diffusion")
    assert "the base somebody/stable-diffusion must be a folder on disk or reachable" in line
    assert "Download it once and name the folder" in line


@pytest.mark.parametrize("cached", ["nothing", "a part", "all"])
def test_configurations_alone_are_fetched_from_the_hub_if_they_arent_cached(
    cached, folder, tmp_path, monkeypatch
) -> None:
    asked = []

    def snapshot_download(
        repo_id: str, *, allow_patterns: list[str], local_files_only: bool = False
    ) -> str:
        assert allow_patterns == list(base.CONFIG_FILES)
        asked.append((repo_id, "cache" if local_files_only else "network"))
        if local_files_only and cached == "nothing":
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        return str(tmp_path if local_files_only and cached == "a part" else folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    name = "somebody/stable-diffusion"
    assert read_base_config(name).name == name
    assert asked == [(name, "cache"), (name, "network")][: 1 if cached == "all" else 2]
    assert not [pattern for pattern in base.CONFIG_FILES if "safetensors" in pattern]


def test_a_single_file_takes_its_configurations_from_base_config(folder, tmp_path) -> None:
    path = tmp_path / "sd.safetensors"
    path.write_bytes(b"weights are not read here")
    config = read_base_config(str(path), base_config=str(folder))
    assert (config.name, config.single_file) == ("sd.safetensors", path)
    assert config.config_dir == folder
    assert "Name their folder or hub id with --base_config" in refusal(path)
    link = tmp_path / "named.safetensors"  # as in the hub's cache
    link.symlink_to(path.rename(tmp_path / "0123abcd"))
    assert read_base_config(str(link), base_config=str(folder)).name == "named.safetensors"


def test_a_single_files_missing_base_config_is_named_by_its_own_flag(tmp_path) -> None:
    path = tmp_path / "sd.safetensors"
    path.touch()
    assert refusal(path, base_config="./nothing").startswith("--base_config must be")


def test_a_single_files_configuration_is_checked_too(folder, tmp_path) -> None:
    (tmp_path / "sd.ckpt").touch()
    change(folder, "unet/config.json", in_channels=9)
    assert "got 9" in refusal(tmp_path / "sd.ckpt", base_config=str(folder))


def test_a_file_that_holds_no_weights_is_refused(tmp_path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "got " in refusal(tmp_path / "notes.txt")
    assert "--pretrained_model_name_or_path must be a hub id" in refusal(tmp_path / "notes.txt")
