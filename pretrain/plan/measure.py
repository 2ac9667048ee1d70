"""A few optimizer steps of a recipe on this machine: their memory and their speed, to hold a plan against."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from pretrain.plan.trial import Trial, in_fresh_process, read_given

if TYPE_CHECKING:
    from pretrain.recipe import TrainRecipe

STEPS = 2
"""Optimizer steps that are measured, after one that is not."""


class Measured(NamedTuple):
    """What the steps took."""

    device: str
    """Name of the device."""
    base_bytes: int
    """Memory of the process before the model is built: Python and libraries. 0 on a GPU."""
    memory_bytes: int
    """Highest memory of the steps above `base_bytes`."""
    step_s: float
    """Seconds of an optimizer step."""
    tokens_per_s: float
    """Tokens of those steps in a second."""
    micro_batches: int
    """Micro-batches in each of these steps."""


def measure(recipe: TrainRecipe, *, micro_batches: int, micro_rows: int) -> Measured:
    """Run steps of `recipe` in a fresh process of its own, with micro-batches of `micro_rows` rows.

    Raises BadInput where the steps do not run here, with the last line of the process.
    """
    given = {"micro_batches": micro_batches, "micro_rows": micro_rows}
    return Measured(**in_fresh_process("pretrain.plan.measure", recipe, about="--measure", **given))


def _measure_here(recipe: TrainRecipe, micro_batches: int, micro_rows: int) -> Measured:
    """Measure in this process, which is fresh."""
    import torch

    trial = Trial(recipe, micro_batches)
    times = trial.steps(micro_rows, 1 + STEPS)
    step_s = sum(times[1:]) / STEPS
    return Measured(
        device=torch.cuda.get_device_name() if trial.cuda else "cpu",
        base_bytes=trial.base_bytes,
        memory_bytes=trial.peak_bytes(),
        step_s=step_s,
        tokens_per_s=micro_batches * micro_rows * trial.training.seq_len / step_s,
        micro_batches=micro_batches,
    )


if __name__ == "__main__":
    recipe, given = read_given()
    print(json.dumps(_measure_here(recipe, given["micro_batches"], given["micro_rows"])._asdict()))
