"""The time of a call on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def milliseconds(run: Callable[[], Any], device: str) -> float:
    """Median of many calls. On CUDA between events, so that the host's own time does not count."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=50, rep=200, return_mode="median"))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def gradients_of(forward: Callable[[], Any], inputs: list[torch.Tensor]) -> Callable[[], Any]:
    """A call that computes the gradients of `inputs` alone: the forward pass was made once, before."""
    outputs = [output for output in forward() if output.requires_grad]
    given = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(outputs, inputs, given, retain_graph=True, allow_unused=True)
