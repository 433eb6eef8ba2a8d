"""The training command, in whose second process every loss is NaN.

python -m tests.spoiled_training --devices 2 --strategy ddp ...
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

import train_lightning
from lightning_module import InpaintingControlNet


def main(argv: list[str]) -> int:
    """Run the command."""
    if os.environ.get("LOCAL_RANK") == "1":
        loss = InpaintingControlNet.loss

        def spoiled(*args: Any) -> torch.Tensor:
            return loss(*args) * torch.nan

        InpaintingControlNet.loss = spoiled  # type: ignore[method-assign]
    return train_lightning.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
