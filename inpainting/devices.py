"""Which device and precision "auto" means, what this machine refuses; autocast, a CPU's memory."""

from __future__ import annotations

import ctypes
import platform

import torch

DTYPES = {"32": torch.float32, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
# glibc's malloc.h. -1 for the first: never trim; 0 for the second: never map.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def best_device_type() -> str:
    """Return the fastest kind of device that is here: "cuda", "mps" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def best_precision(device: torch.device | str) -> str:
    """Return what "auto" means on a device: a key of DTYPES.

    bf16 has float32's range and needs no loss scale, but only CUDA >= 8.0 computes in it.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return "32"
    return "bf16-mixed" if torch.cuda.get_device_capability(device) >= (8, 0) else "16-mixed"


def choose_device(name: str, *, precision: str) -> tuple[torch.device, torch.dtype]:
    """Resolve infer.py's --device and --precision; the dtype is that of UNet and ControlNet.

    Raises:
        ValueError: no such device, or a precision that it hasn't got.
    """
    if name == "auto":
        name = best_device_type()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device must be a device of this machine, got {name} ({reason}). Try auto or cpu."
        ) from error
    if precision == "auto":
        precision = best_precision(device)
    if precision == "16-mixed" and device.type == "cpu":
        raise ValueError(
            "--precision 16-mixed must run on a GPU, got the CPU. Use 32 or bf16-mixed."
        )
    return device, DTYPES[precision]


def outside_autocast(device: torch.device) -> torch.autocast:
    """Let a frozen network compute in the dtype of its weights.

    Under autocast a GPU would bring every norm to float32 and back; and Stable Diffusion's VAE
    overflows in fp16.
    """
    return torch.autocast(device.type, enabled=False)


def keep_freed_memory(device_type: str) -> None:
    """Let a process that computes on the CPU keep the memory of what it frees.

    glibc gives a large tensor's pages back at once, and the next tensor waits until the kernel has
    cleared new ones: 6 to 15 % of a training step, half of what the VAE takes for a batch of 4
    (docs/benchmarks). It costs a sixth more memory at the peak, for the whole process and those
    that it forks. Does nothing where tensors are elsewhere, or without glibc.

    Args:
        device_type: where the tensors are; "cpu" is the only one that counts.
    """
    if device_type == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_MAX, 0)
