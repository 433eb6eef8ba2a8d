from __future__ import annotations

import argparse
import platform
import subprocess
import sys

import pytest
import torch

from inpainting import infer_flags
from inpainting.devices import DTYPES, best_device_type, best_precision, choose_device
from inpainting.preflight import resolve_device


def pretend(
    monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int] | None, has_mps: bool = False
) -> None:
    """Make torch say that there is a CUDA device of this capability, or none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)


@pytest.mark.parametrize(
    ("capability", "has_mps", "device_type", "precision"),
    [((9, 0), False, "cuda", "bf16-mixed"), ((8, 0), False, "cuda", "bf16-mixed"),
     ((7, 5), False, "cuda", "16-mixed"), (None, True, "mps", "32"), (None, False, "cpu", "32")],
)  # fmt: skip
def test_auto_means_the_same_to_both_commands(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, has_mps: bool,
    device_type: str, precision: str,
) -> None:  # fmt: skip
    pretend(monkeypatch, capability=capability, has_mps=has_mps)
    args = argparse.Namespace(
        use_8bit_adam=False, accelerator="auto", devices="1", precision="auto", strategy="auto"
    )
    resolve_device(args)

    assert best_device_type() == device_type
    assert best_precision(device_type) == precision
    assert args.precision == precision
    assert args.accelerator == ("gpu" if device_type == "cuda" else device_type)


def test_training_on_the_cpu_beside_a_gpu_is_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability=(9, 0))
    args = argparse.Namespace(
        use_8bit_adam=False, accelerator="cpu", devices="-1", precision="auto", strategy="auto"
    )
    resolve_device(args)

    assert (args.precision, args.devices) == ("32", 1)


@pytest.mark.parametrize(
    ("accelerator", "need"), [("gpu", "CUDA"), ("mps", "Apple's Metal"), ("tpu", "torch_xla")]
)
def test_an_accelerator_that_is_not_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, need: str
) -> None:
    pretend(monkeypatch, capability=None)
    args = argparse.Namespace(
        use_8bit_adam=False, accelerator=accelerator, devices="1", precision="auto", strategy="auto"
    )
    with pytest.raises(ValueError, match=f"--accelerator {accelerator} needs {need}, got"):
        resolve_device(args)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("auto", torch.float32), ("32", torch.float32), ("bf16-mixed", torch.bfloat16)],
)
def test_precision_is_the_networks_dtype(precision: str, dtype: torch.dtype) -> None:
    assert choose_device("cpu", precision=precision) == (torch.device("cpu"), dtype)


def test_what_the_machine_has_not_got_is_refused() -> None:
    with pytest.raises(ValueError, match="--device must be a device of this machine, got toaster"):
        choose_device("toaster", precision="auto")
    with pytest.raises(ValueError, match="--precision 16-mixed must run on a GPU"):
        choose_device("cpu", precision="16-mixed")


def test_every_precision_of_the_command_is_known() -> None:
    assert {"auto", *DTYPES} == set(infer_flags.PRECISIONS)


COUNT_FAULTS = """
import resource, sys, torch
from inpainting.devices import keep_freed_memory
keep_freed_memory(sys.argv[1])
for i in range(40):
    if i == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
@pytest.mark.parametrize(("device_type", "is_kept"), [("cpu", True), ("cuda", False)])
def test_a_cpu_uses_a_freed_tensors_memory_again(device_type: str, is_kept: bool) -> None:
    command = [sys.executable, "-c", COUNT_FAULTS, device_type]
    num_faults = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert (num_faults < 100) == is_kept, num_faults
