"""What a run hands out names no home and holds no secret."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.commands import run_typed
from tools import export

OWNER, SECRET = b"alice-q7x", b"hf_Xq7secretZ9token"


def test_weights_records_and_curves_name_no_home_and_hold_no_secret(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / OWNER.decode()
    base = shutil.copytree(tiny.base_folder(), home / "my-base")
    data = shutil.copytree(tiny.coco_folder(), home / "data")
    weights = home / "old" / "controlnet.pth"
    weights.parent.mkdir()
    torch.save(tiny.controlnet(tiny.base()).state_dict(), weights)
    monkeypatch.setenv("HF_TOKEN", SECRET.decode())
    monkeypatch.setenv("HOME", str(home))
    code, stdout, stderr = run_typed(
        ["train_lightning.py", *flags, "--image_dir", data / "images",
         "--ann_file", data / "annotations" / "instances.json",
         "--caption_file", data / "annotations" / "captions.json",
         "--pretrained_model_name_or_path", base, "--controlnet_weights", weights,
         "--ema_decay", "0.5", "--max_steps", "2", "--log_images_every_n_steps", "1",
         "--output_dir", home / "outputs"]
    )  # fmt: skip
    assert code == 0, stdout + stderr
    (run_dir,) = (home / "outputs").iterdir()
    for kind in ("ldm", "diffusers"):
        folder = tmp_path / "exported" / kind
        assert export.main([str(run_dir), "--format", kind, "--output_dir", str(folder)]) == 0
    given = [
        path
        for folder in (run_dir / "final_model", tmp_path / "exported")
        for path in folder.rglob("*")
        if path.is_file()
    ] + list(run_dir.glob("events*"))
    assert {path.suffix for path in given} >= {".pth", ".safetensors", ".json", ".md"}
    for path in given:
        content = path.read_bytes()
        assert OWNER not in content, path
        assert SECRET not in content, path
    assert OWNER in (run_dir / "run.json").read_bytes(), "the one file that may was not looked into"
