"""Which Trainer the flags describe, apart from what the integration tests see."""

from __future__ import annotations

import argparse

import pytest
from pytorch_lightning.strategies import DDPStrategy

from lightning_trainer import StopWithoutProgress, build_strategy


def test_patience_is_the_flags_and_the_waiting_the_checkpoints() -> None:
    first, resumed = (StopWithoutProgress("val/loss", patience=patience) for patience in (2, 5))
    first.wait_count = 1
    resumed.load_state_dict(first.state_dict())
    assert (resumed.patience, resumed.wait_count) == (5, 1)


@pytest.mark.parametrize(
    ("strategy", "devices", "is_ddp"),
    [("auto", 1, False), ("auto", 2, True), ("auto", [0, 2], True), ("ddp", 1, True)],
)
def test_ddp_keeps_gradients_once(strategy, devices, is_ddp) -> None:
    args = argparse.Namespace(strategy=strategy, devices=devices, num_nodes=1, accelerator="gpu")
    built = build_strategy(args)
    if not is_ddp:
        assert built == strategy
        return
    assert isinstance(built, DDPStrategy)
    assert built._ddp_kwargs == {"gradient_as_bucket_view": True}
