"""`data.micro_batch: auto`: the largest micro-batch that fits into the memory of a device, found by trial.

A fresh process makes steps of the recipe's model on random rows, with one row, two, four and so on. Memory grows with
the rows along a straight line, so the next size is tried only where the line says that it fits, and the line gives the
largest one. The process is alone: it holds all of the optimizer's state, of which a rank of ZeRO 1 to 3 holds a part.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from pretrain import distributed
from pretrain.data.datasets import micro_shape
from pretrain.plan.estimate import USABLE
from pretrain.plan.trial import Trial, in_fresh_process, read_given
from sharebert_common.errors import BadInput

if TYPE_CHECKING:
    from pretrain.distributed import World
    from pretrain.recipe import ResolvedTraining, TrainRecipe

CPU_SHARE = 0.5
"""Share of a machine's free memory that its ranks fill. A CPU has no hard limit, but a machine that swaps is slow."""

TRIAL_MICRO_BATCHES = 2
"""Micro-batches of a trial step. From the second on, gradients exist while activations do."""

TRIAL_S = 15.0
"""No larger size is tried where it would end later than this; a CPU would take minutes."""


class Fit(NamedTuple):
    """What the trial found on one device."""

    rows: int
    """The largest micro-batch."""
    memory_bytes: int
    """Its memory, measured or on the line through the measured sizes."""
    limit_bytes: int
    """What it may take."""


def settle_micro_batch(
    recipe: TrainRecipe, training: ResolvedTraining, world: World
) -> tuple[TrainRecipe, ResolvedTraining]:
    """The recipe with a number in place of `data.micro_batch: auto`, and what it resolves to. A collective.

    Each rank tries its GPU, and on CPUs one rank of each machine; the smallest number counts. Raises Refused, on every
    rank, where not even one row fits.
    """
    if recipe.data.micro_batch != "auto":
        return recipe, training
    cuda = world.device.type == "cuda"
    fit = None
    with distributed.refused_by_all():
        if cuda or world.local_rank == 0:
            fit = fit_micro_batch(
                recipe,
                most=training.micro_rows,
                device=world.local_rank if cuda else None,
                sharing=1 if cuda else int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            )
    smallest = distributed.smallest(fit)
    assert smallest is not None
    rows, memory_bytes, limit_bytes = smallest
    settled = replace(recipe, data=replace(recipe.data, micro_batch=rows))
    micro_batches, micro_rows = micro_shape(settled.data, world.world_size)
    why = (
        f"data.micro_batch: auto picked {rows}: the whole share of a rank fits"
        if rows == training.micro_rows
        else f"data.micro_batch: auto picked {rows}, the most rows that fit"
    )
    why += f" ({memory_bytes / 1e9:.2f} of {limit_bytes / 1e9:.2f} GB)"
    return settled, replace(training, micro_batches=micro_batches, micro_rows=micro_rows, picked=why)


def fit_micro_batch(recipe: TrainRecipe, *, most: int, device: int | None = None, sharing: int = 1) -> Fit:
    """Find the largest micro-batch of at most `most` rows that fits, in a fresh process.

    Args:
        recipe: of the training.
        most: rows of a rank's share of a global batch.
        device: number of the GPU, among those that this process sees; None on a CPU.
        sharing: ranks that share the memory, on a CPU.

    Raises BadInput where not even one row fits.
    """
    given = {"most": most, "sharing": sharing}
    found = in_fresh_process("pretrain.plan.fit", recipe, about="data.micro_batch: auto", device=device, **given)
    fit = Fit(**found)
    if fit.rows < 1:
        raise BadInput(
            f"data.micro_batch: auto: one row takes {fit.memory_bytes / 1e9:.2f} GB, and a rank may take "
            f"{fit.limit_bytes / 1e9:.2f} GB; set recompute: true, raise zero.stage, use precision=bf16, or give a "
            "number of rows"
        )
    return fit


def largest_that_fits(
    try_rows: Callable[[int], float | None], *, most: int, limit_bytes: float, confirm: bool
) -> tuple[int, float]:
    """The largest number of rows whose memory is at most `limit_bytes`, and that memory; 0 where one row is too much.

    Args:
        try_rows: makes a step with this many rows and returns its memory in bytes; None where it ran out of memory,
            after which it is not called again.
        most: no more rows than this.
        limit_bytes: what a step may take.
        confirm: try what the line gives as well. Without it the time counts, see TRIAL_S.
    """
    began, rows = time.monotonic(), 1
    sizes: list[tuple[int, float]] = []
    while True:
        started = time.monotonic()
        found = try_rows(rows)
        now = time.monotonic()
        if found is None or found > limit_bytes:
            return sizes[-1] if sizes else (0, found or limit_bytes)
        sizes.append((rows, found))
        double = min(2 * rows, most)
        late = not confirm and now - began + 2 * (now - started) > TRIAL_S
        if rows == most or _on_the_line(sizes, double) > limit_bytes or late:
            break
        rows = double
    picked = rows
    low, high = rows, most + 1
    while high - low > 1:
        picked = (low + high) // 2
        low, high = (picked, high) if _on_the_line(sizes, picked) <= limit_bytes else (low, picked)
    picked = low
    while confirm and picked > rows:
        found = try_rows(picked)
        if found is None:
            return sizes[-1]
        if found <= limit_bytes:
            return picked, found
        picked = max(rows, 7 * picked // 8)
    return picked, _on_the_line(sizes, picked)


def _on_the_line(sizes: list[tuple[int, float]], rows: int) -> float:
    """Memory of `rows` rows on the line through the last two sizes; through the origin where there is one size."""
    last_rows, last = sizes[-1]
    before_rows, before = sizes[-2] if len(sizes) > 1 else (0, 0.0)
    return last + max(0.0, last - before) / (last_rows - before_rows) * (rows - last_rows)


def _fit_here(recipe: TrainRecipe, most: int, sharing: int) -> Fit:
    """Find the largest micro-batch on this process's device. The process is fresh."""
    limit = CPU_SHARE * free_memory() / sharing
    trial = Trial(recipe, TRIAL_MICRO_BATCHES)
    if trial.cuda:
        limit = USABLE * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    for rows in (1, 2):  # Adam's moments, and what is compiled for one shape and then for any
        trial.steps(min(rows, most))

    def try_rows(rows: int) -> float | None:
        trial.reset_peak()
        try:
            trial.steps(rows)
        except torch.OutOfMemoryError:
            return None
        return trial.peak_bytes(with_holes=True)

    rows, memory_bytes = largest_that_fits(try_rows, most=most, limit_bytes=limit, confirm=trial.cuda)
    return Fit(rows, int(memory_bytes), int(limit))


def free_memory() -> float:
    """Bytes of this machine's memory that processes can still take, or of this process's control group (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit, used in _control_groups():
        free = min(free, limit - used)
    return max(free, 0.0)


def _control_groups() -> list[tuple[float, float]]:
    """Limit and use in bytes of each control group (version 2) of this process that has a limit: SLURM and containers
    set them. Copies of files that the system can give back do not count as used."""
    found = []
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").strip().splitlines()
        inside = next(line.partition("::")[2] for line in own if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    folder = Path("/sys/fs/cgroup") / inside.lstrip("/")
    for group in (folder, *folder.parents):
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                files = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
                used = float((group / "memory.current").read_text()) - (float(files[1]) if files else 0.0)
                found.append((float(limit), used))
        except (OSError, ValueError):
            continue
    return found


if __name__ == "__main__":
    recipe, given = read_given()
    print(json.dumps(_fit_here(recipe, given["most"], given["sharing"])._asdict()))
