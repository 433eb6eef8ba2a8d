"""Which Trainer the flags describe, apart from what the integration tests see."""

from __future__ import annotations

import argparse

import pytest
import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy

from lightning_trainer import StopWithoutProgress, build_plugins, build_strategy


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


def environment_of(args: argparse.Namespace) -> object:
    """Return where a Trainer with these flags believes to be."""
    trainer = pl.Trainer(
        accelerator="cpu", strategy=build_strategy(args), plugins=build_plugins(args), logger=False
    )
    return trainer._accelerator_connector.cluster_environment


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_slurms_jobs_are_not_queued_again_by_lightning(strategy, monkeypatch) -> None:
    args = argparse.Namespace(strategy=strategy, devices=1, num_nodes=1, accelerator="cpu")
    slurm = {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0",
             "NODEID": "0"}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    environment = environment_of(args)
    assert isinstance(environment, SLURMEnvironment)
    assert not environment.auto_requeue
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, "0")  # torchrun within SLURM
    assert isinstance(environment_of(args), TorchElasticEnvironment)
