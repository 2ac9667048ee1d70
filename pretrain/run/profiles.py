"""Traces of single steps by torch.profiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def profiled(run: Path, step: int, *, wanted: bool) -> Iterator[None]:
    """Where `wanted`, write a trace of what runs inside to RUN/profiles/step-N.json.gz.

    A disk that does not take it ends no run: a line says so.
    """
    if not wanted:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    path = run / "profiles" / f"step-{step:08d}.json.gz"
    try:
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        print(f"{path}: no trace could be written ({error})", flush=True)
