"""Between log points nothing asks the device for a value: on a GPU each question stops the queue.

Counted on a CPU, where asking costs nothing but is the same call.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from inpainting.flags import build_parser
from inpainting.preflight import resolve_device
from lightning_run import assemble
from tests import stand_in_adam, tiny

ROOT = Path(__file__).parents[2]
# What a value is asked by: .item(), float(), bool(), int() are the first one.
OPERATORS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
METHODS = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)
# It reads the loss of each step on a CPU; on a GPU that of log points alone.
BAR = "ProgressBar.on_train_batch_end"


def asker(frame: FrameType | None) -> str:
    """Return the project's function that asked, or the innermost one if it was none."""
    innermost = ""
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        if path.parent in (ROOT, ROOT / "inpainting"):
            return name.split(".<locals>")[0]
        innermost = innermost or (f"{path.name}: {name}" if path != Path(__file__) else "")
        frame = frame.f_back
    return innermost


class Questions(pl.Callback):
    """Keeps who asked in each step, from the batch's start to the last callback's end."""

    def __init__(self) -> None:
        self.by_step: dict[int, Counter[str]] = defaultdict(Counter)
        self.found: list[str] = []

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(_, func, types, args=(), kwargs=None) -> Any:
                if func._schema.name in OPERATORS:
                    self.found.append(asker(sys._getframe(1)))
                return func(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(_, func, types, args=(), kwargs=None) -> Any:
                if func in METHODS:
                    self.found.append(asker(sys._getframe(1)))
                return func(*args, **(kwargs or {}))

        self.modes = (Operators(), Methods())

    def on_train_batch_start(self, *_: Any) -> None:
        for mode in self.modes:
            mode.__enter__()

    def stop(self, step: int) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)
        self.by_step[step].update(self.found)
        self.found.clear()


class Stop(pl.Callback):
    """Comes after all other callbacks."""

    def __init__(self, questions: Questions) -> None:
        self.questions = questions

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.questions.stop(trainer.global_step)


@pytest.fixture
def ask(flags: list[str], output_dir: Path) -> Iterator[Any]:
    """Trains 5 steps of an epoch, points at 4 and 5; returns who asked how often at each."""

    def train(*more: str) -> dict[int, Counter[str]]:
        args = build_parser().parse_args(
            [*flags, *more, "--output_dir", str(output_dir), "--log_every_n_steps", "4",
             "--log_images_every_n_steps", "0", "--val_split", "0", "--limit_train_batches", "5"]
        )  # fmt: skip
        args.prediction_type, args.uses_demo_base, args.monitor = "epsilon", False, "train_loss"
        resolve_device(args)
        run = assemble(args, index=tiny.coco_index(), unreadable_rows=(), checkpoint_path=None)
        questions = Questions()
        run.trainer.callbacks = [questions, *run.trainer.callbacks, Stop(questions)]
        run.trainer.fit(run.module, datamodule=run.datamodule)
        return questions.by_step

    return train


EVERYTHING = [
    "--ema_decay", "0.9", "--snr_gamma", "5", "--gradient_checkpointing",
    "--lr_scheduler", "cosine",
]  # fmt: skip


@pytest.mark.parametrize(
    "more", [[], EVERYTHING, ["--precision", "bf16-mixed"]], ids=["plain", "everything", "bf16"]
)
def test_between_log_points_nothing_waits_for_the_device(ask: Any, more: list[str]) -> None:
    by_step = ask(*more)
    assert sorted(by_step) == [1, 2, 3, 4, 5]
    for step in (1, 2, 3):
        assert by_step[step].keys() == {BAR}, f"step {step}"
    for step in (4, 5):
        assert by_step[step].keys() >= {"Curves.on_train_batch_end", "FiniteSteps.check"}


def test_adam_in_8_bits_waits_once_a_step_to_leave_bad_ones_out(
    ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_adam.install(monkeypatch)
    by_step = ask("--use_8bit_adam")
    for step in (1, 2, 3):
        assert by_step[step].keys() == {BAR, "FiniteSteps.leave_out"}, f"step {step}"
        assert by_step[step]["FiniteSteps.leave_out"] == 1, f"step {step}"
