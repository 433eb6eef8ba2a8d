"""Whether two runs left the same: states, ranking, curves and exports, to the bit.

How fast they were is another matter, and so is when.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STATE_PARTS = (
    "global_step", "epoch", "state_dict", "average", "optimizer_states", "lr_schedulers",
    "loss_sums", "loops",
)  # fmt: skip
EXPORTS = ("diffusion_pytorch_model.safetensors", "config.json", "inpainting.json")


def read_last(run_dir: Path) -> dict[str, Any]:
    """Return a run's last.ckpt."""
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)


def read_curves(run_dir: Path) -> dict[str, dict[int, float]]:
    """Return each step's value of everything but the speed."""
    return {tag: dict(points) for tag, points in read_points(run_dir).items()}


def read_points(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points as they stand there; a step stands twice where a resume didn't purge it."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"]) - {"train/samples_per_second"}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def list_differences(expected: Any, got: Any, *, at: str) -> list[str]:
    """Compare nested states bit by bit; returns one line for each difference."""
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(expected, got) else [f"{at}: {(expected - got).abs().max()}"]
    if isinstance(expected, dict):
        if expected.keys() != got.keys():
            return [f"{at}: keys {expected.keys() ^ got.keys()}"]
        return [d for k in expected for d in list_differences(expected[k], got[k], at=f"{at}/{k}")]
    if isinstance(expected, list | tuple):
        if len(expected) != len(got):
            return [f"{at}: {len(expected)} entries, got {len(got)}"]
        pairs = enumerate(zip(expected, got, strict=True))
        return [d for i, pair in pairs for d in list_differences(*pair, at=f"{at}[{i}]")]
    return [] if expected == got else [f"{at}: {expected}, got {got}"]


def compare_runs(expected: Path, got: Path) -> list[str]:
    """Compare what two finished runs left in their folders; returns one line a difference."""
    runs = (expected, got)
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in runs]
    differences = list_differences(*names, at="checkpoints")
    weights = [
        torch.load(run / "final_model" / "controlnet.pth", weights_only=True) for run in runs
    ]
    differences += list_differences(*weights, at="controlnet.pth")
    for name in EXPORTS:
        contents = [(run / "final_model" / name).read_bytes() for run in runs]
        differences += [] if contents[0] == contents[1] else [f"final_model/{name}"]
    states = [read_last(run) for run in runs]
    differences += list_differences(
        *({part: state.get(part) for part in STATE_PARTS} for state in states), at="last.ckpt"
    )
    differences += list_differences(*map(_ranking, states), at="ranking")
    return differences + list_differences(*map(read_points, runs), at="curves")


def _ranking(state: dict[str, Any]) -> dict[str, Any]:
    """Return the named checkpoints' scores and the best one, without their folder."""
    callback = next(v for k, v in state["callbacks"].items() if k.startswith("NamedCheckpoint"))
    scores = {Path(path).name: score for path, score in callback["best_k_models"].items()}
    return {**scores, "best": Path(callback["best_model_path"]).name}
