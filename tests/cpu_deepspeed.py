"""The training command with DeepSpeed on CPU, which Lightning and the command itself refuse.

    python -m tests.cpu_deepspeed --strategy deepspeed_stage_3 --devices 2 ...

Everything but the strategy is the command's own code.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import deepspeed
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, StrategyRegistry
from torch.nn import Module
from torch.optim import Optimizer

from inpainting.flags import build_parser
from train_lightning import UserError, prepare, train


class CpuDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeedStrategy over gloo, for tests only.

    Args:
        stage: of ZeRO, 1 to 3.
        offload_optimizer: keep Adam's state on the host, in DeepSpeed's own Adam.
    """

    def __init__(self, *, stage: int, offload_optimizer: bool = False) -> None:
        super().__init__(stage=stage, offload_optimizer=offload_optimizer)
        assert self.config is not None
        # By default ZeRO-3 keeps tensors below 100,000 elements whole: all of a tiny ControlNet's.
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    def setup_environment(self) -> None:
        """Skip the check for CUDA."""
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Skip the check of the devices' numbers: CPUs have none."""
        # DeepSpeed would compile its shared-memory reduction first: 40 s, and g++ is needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(
        self, model: Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> tuple[deepspeed.DeepSpeedEngine, Optimizer]:
        """Initialize the engine with device_rank -1: a CPU's number is None."""
        engine, zero_optimizer, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=-1),
            config=self.config,
            model=model,
            model_parameters=(p for p in model.parameters() if p.requires_grad),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, zero_optimizer


def main(argv: Sequence[str]) -> int:
    """Run the command with its DeepSpeed strategy replaced by the one for CPU."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    stage = {"deepspeed": 2, "deepspeed_stage_2_offload": 2}.get(args.strategy)
    stage = stage or int(args.strategy.removeprefix("deepspeed_stage_"))
    # A name of its own: the command's refusals know the real ones.
    args.strategy = f"{args.strategy.replace('deepspeed', 'deepspeed_cpu')}"
    StrategyRegistry.register(
        args.strategy,
        CpuDeepSpeedStrategy,
        stage=stage,
        offload_optimizer=args.strategy.endswith("_offload"),
    )
    try:
        run = prepare(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    assert run is not None
    return train(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
