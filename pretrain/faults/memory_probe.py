"""One step before the first, so that a run that does not fit into memory says so at its start.

The loss of the dry run is not a number, and so is its gradient: the engine skips such a step and leaves weights
and moments alone, at every ZeRO stage, but it takes the memory of a real one, save what the optimizer uses for
a moment. Generators, counters and the loss scale are put back: a run with it is bit for bit the run without it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from pretrain.checkpoint.rng_state import generators, set_generators
from pretrain.data.batches import MicroBatch
from pretrain.data.loader import Loader
from pretrain.engine import fragments as slices
from pretrain.engine.engine import load_scaler_state, optimizer_step, scaler_state
from sharebert_common.errors import BadInput

COUNTERS = ("skipped_steps", "global_steps", "global_samples")


def dry_run(
    engine: Any, loader: Loader, forward: Callable[[MicroBatch], tuple[torch.Tensor, torch.Tensor]], clip: float
) -> None:
    """Run one step that changes nothing, on rows that `loader` will hand out again. Every rank calls this.

    Raises BadInput where memory does not suffice, with what to lower.
    """
    state, random = loader.state(), generators()
    counters, scaler = {name: getattr(engine, name) for name in COUNTERS}, scaler_state(engine)
    slices.create_moments(engine)
    rows = 0
    try:
        for micro in next(loader).micro_batches:
            rows = len(micro.tokens)
            loss_sum, _ = forward(dataclasses.replace(micro, padded=True))
            engine.backward(loss_sum * math.nan, scale_wrt_gas=False)
            optimizer_step(engine, clip)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        first_line = str(error).split("\n")[0]
        raise BadInput(
            f"data.micro_batch: a step with {rows} rows at once does not fit into memory ({first_line}); "
            "lower data.micro_batch (the global batch stays as it is), or raise zero.stage, or use precision=bf16"
        ) from error
    for name, value in counters.items():
        setattr(engine, name, value)
    load_scaler_state(engine, scaler)
    set_generators(random)
    loader.load_state(state)


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA and Python have exceptions for it; the CPU's allocator has only its words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
