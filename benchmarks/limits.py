"""How far a step is from what its device could do: a matrix product's speed, kernels, waits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType

from benchmarks.timing import read_clock_ms


def matrix_flops_per_s(device: torch.device, precision: str) -> float:
    """Measure what the device reaches in a large matrix product: a GPU in bf16, always."""
    is_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if is_gpu or precision == "bf16-mixed" else torch.float32
    side, num_products = 8192 if is_gpu else 1024, 20
    matrix = torch.randn(side, side, device=device).to(dtype)
    torch.mm(matrix, matrix)
    start = read_clock_ms(device)
    for _ in range(num_products):
        torch.mm(matrix, matrix)
    return num_products * 2 * side**3 / ((read_clock_ms(device) - start) / 1e3)


def count_launches(step: Callable[[], None]) -> tuple[int, int]:
    """Return how many kernels a step starts on the GPU, and how often it waits for it."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
    events = profiler.events()
    assert events is not None
    num_kernels = sum(
        event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith("Mem")
        for event in events
    )
    # For the whole device the profiler alone waits.
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize")
    return num_kernels, sum(event.name in waits for event in events)
