"""One trial step before the first, so that a run that does not fit into memory says so at its start.

The loss of the trial step is not a number, and so is its gradient. The engine skips such a step and leaves weights and
moments alone, at every ZeRO stage, but it takes the memory of a real step, except for what the optimizer uses for a
moment. Generators, counters, the loss scale and the loader are put back: a run with the probe is bit for bit the run
without it.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from pretrain.checkpoint.rng_state import rng_state, set_rng_state
from pretrain.data.loader import Loader
from pretrain.engine.engine import Engine
from pretrain.objective import Objective
from sharebert_common.errors import BadInput


def probe_memory(engine: Engine, loader: Loader, objective: Objective) -> None:
    """Run one step that changes nothing, on rows that `loader` will hand out again. Every rank calls this.

    Raises BadInput where memory does not suffice, with what to lower.
    """
    loader_state, random = loader.state(), rng_state()
    rows = 0
    try:
        with engine.uncounted():
            for given in next(loader).micro_batches:
                micro = given.cut(loader.seq_len)  # whole rows take more memory than short ones
                rows = len(micro.tokens)
                losses = objective(engine, dataclasses.replace(micro, padded=True))
                engine.backward(losses.loss * math.nan)
                engine.step()
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        first_line = str(error).split("\n")[0]
        raise BadInput(
            f"data.micro_batch: a step with {rows} rows at once does not fit into memory ({first_line}); "
            "lower data.micro_batch (the global batch stays as it is), or raise zero.stage, or use precision=bf16"
        ) from error
    set_rng_state(random)
    loader.load_state(loader_state)


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA and Python have exceptions for it; the CPU's allocator has only its words."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
