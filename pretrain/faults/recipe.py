"""The key `faults` of a train recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from sharebert_common.recipe import MOST_SECONDS, STRICT


@dataclass(config=STRICT, kw_only=True)
class FaultsRecipe:
    """What a run does about faults."""

    max_skipped: Annotated[int, Field(gt=0)] = 5
    """Steps in a row that may be skipped because the gradient is not finite. Then the run returns to its newest
    checkpoint. (Overflows of fp16 do not count while its loss scale can still fall.)"""
    max_returns: Annotated[int, Field(ge=0)] = 3
    """How often the run may return to the same checkpoint before it fails."""
    spike_deviations: Annotated[float, Field(ge=0)] = 6.0
    """A logged loss this many running deviations above the running mean is reported as a spike; 0 for no reports."""
    hang_s: Annotated[float, Field(ge=0, le=MOST_SECONDS)] = 600.0
    """A rank that makes no progress for this long ends the attempt, with the stacks of all ranks in the log; 0 for
    never. Keep it below `collective_timeout_s`, and above the longest step, the longest block of a validation and the
    longest look (`monitor.look`): each is progress."""
    slow_factor: Annotated[float, Field(ge=0)] = 1.5
    """A rank whose own work (waiting for rows, and forward passes) takes this many times the median is reported; 0
    for no reports."""
    memory_probe: bool = True
    """Try the largest micro-batch once before the first step, so that a lack of memory shows at the start."""
