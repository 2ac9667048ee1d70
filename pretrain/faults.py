"""Faults of the training itself: steps that are not finite, rows to pass over, and spikes of the loss.

A step whose gradient is not finite is skipped: its rows and its learning rate are used up, weights and
moments stay. After too many in a row the run goes back to its newest checkpoint and passes over the rows
of the skipped steps; where that does not help, over all rows since the checkpoint, as PaLM's authors did
(Chowdhery et al. 2022, section 5.1). A run that still comes back to the same checkpoint is ended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, field
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from pretrain import distributed
from pretrain.data import Loader
from pretrain.distributed import World
from sharebert_recipe import STRICT, write_atomically

SPIKE_MEMORY_LINES = 50
"""Lines over which the running mean and deviation of the loss forget; half as many come before a first report."""


@dataclass(config=STRICT, kw_only=True)
class FaultsRecipe:
    """What a run does about faults."""

    max_skipped: Annotated[int, Field(gt=0)] = 5
    """Steps in a row that may be skipped for a gradient that is not finite; then the run goes back to its newest
    checkpoint. (Overflows of fp16 while its loss scale can still fall do not count.)"""
    max_returns: Annotated[int, Field(ge=0)] = 3
    """How often it may go back to one checkpoint; then it fails."""
    spike_deviations: Annotated[float, Field(ge=0)] = 6.0
    """A logged loss so many running deviations above the running mean is reported as a spike; 0 reports none."""
    hang_s: Annotated[float, Field(ge=0)] = 600.0
    """A rank that makes no progress for so long ends the launch, with the stacks of all ranks in the log; 0 never
    does. Keep it below `collective_timeout_s`, and above the longest step."""
    slow_factor: Annotated[float, Field(ge=0)] = 1.5
    """A rank whose own work (data and forward passes) takes so many times the median is named; 0 names none."""
    dry_run: bool = True
    """Try the largest micro-batch once before the first step, so that running out of memory shows at the start."""


class TooManyFaults(RuntimeError):
    """The run cannot go on by itself; the message says what was tried."""


@plain_dataclass(frozen=True)
class BadRows:
    """Positions `first` to `end` - 1 of the order of rows, given up at `step` for the checkpoint of `back_to`."""

    first: int
    end: int
    step: int
    back_to: int


@plain_dataclass
class BadRowsFile:
    """`RUN/bad_rows.jsonl`: what was given up, and is passed over by this launch and all later ones."""

    path: Path
    world: World
    entries: list[BadRows] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Read by rank 0 for all; a collective. Raises BadInput, on every rank, where it is not what was written."""
        text, refusal = "", None
        if self.world.is_main and self.path.exists():
            text = self.path.read_text(encoding="utf-8")
        try:
            fields = list(BadRows.__dataclass_fields__)
            lines = [json.loads(line) for line in distributed.same_everywhere(text).splitlines()]
            self.entries = [BadRows(**{name: int(line[name]) for name in fields}) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            refusal = f"{self.path}: not a list of rows to pass over ({error}); remove the line that is damaged"
        distributed.first_refusal(refusal)

    def add(self, entry: BadRows) -> None:
        """Remember `entry`, on disk before anything else happens. Every rank calls this with the same one."""
        self.entries.append(entry)
        if self.world.is_main:
            write_atomically(self.path, "".join(json.dumps(asdict(e)) + "\n" for e in self.entries))

    def returns_to(self, step: int) -> int:
        """How often the run went back to the checkpoint of `step`."""
        return sum(entry.back_to == step for entry in self.entries)

    def pass_over(self, loader: Loader, global_batch: int) -> None:
        """Let `loader` go on behind the bad rows where its next global batch would hold some."""
        state = loader.state()
        start = int(state["rows_consumed"])
        while behind := [e.end for e in self.entries if e.first < start + global_batch and start < e.end]:
            start = max(behind)
        if start != state["rows_consumed"]:
            loader.load_state(state | {"rows_consumed": start})


class SkippedSteps:
    """Steps skipped one after another."""

    def __init__(self, recipe: FaultsRecipe, report: Callable[[str], None]) -> None:
        self._most, self._report = recipe.max_skipped, report
        self.forget()

    def forget(self) -> None:
        """Start counting anew."""
        self.in_a_row = 0
        self.first_row = 0
        self.end_row = 0

    def count(self, step: int, rows: range, skipped: bool) -> None:
        """Note how `step` on the positions `rows` went."""
        if not skipped:
            self.forget()
            return
        if not self.in_a_row:
            self.first_row = rows.start
        self.in_a_row += 1
        self.end_row = rows.stop
        self._report(
            f"step {step}: the gradient is not finite; skipped, {self.in_a_row} in a row "
            f"(rows {rows.start} to {rows.stop - 1} of the order)"
        )

    @property
    def too_many(self) -> bool:
        """Whether going on like this makes no sense."""
        return self.in_a_row >= self._most


def give_up_rows(
    skips: SkippedSteps, bad_rows: BadRowsFile, recipe: FaultsRecipe, *, step: int, back_to: int, consumed: int
) -> BadRows:
    """The rows to pass over on going back at `step` to the checkpoint of `back_to`, made with `consumed` rows.

    Raises TooManyFaults where the run went back there often enough.
    """
    returns = bad_rows.returns_to(back_to)
    if returns >= recipe.max_returns:
        raise TooManyFaults(
            f"step {step}: {skips.in_a_row} steps in a row were not finite, and going back to step {back_to} "
            f"{returns} times did not help (rows tried: {bad_rows.path}); lower optimizer.lr, or look at these rows"
        )
    return BadRows(skips.first_row if returns == 0 else consumed, skips.end_row, step, back_to)


class SpikeDetector:
    """Running mean and deviation of the logged losses; it reports a loss far above them, and does nothing else."""

    def __init__(self, deviations: float, report: Callable[[str], None]) -> None:
        self._limit, self._report = deviations, report
        self._lines, self._mean, self._variance = 0, 0.0, 0.0

    def look(self, step: int, loss: float) -> float | None:
        """How many deviations `loss` is above the mean of the lines before; None while there are too few of them."""
        known = self._lines >= SPIKE_MEMORY_LINES // 2
        above = (loss - self._mean) / max(math.sqrt(self._variance), 1e-9) if known else None
        if above is not None and 0 < self._limit < above:
            self._report(
                f"step {step}: loss {loss:.4f} is {above:.1f} deviations above its running mean {self._mean:.4f}"
            )
        self._lines += 1
        weight = max(1 / self._lines, 1 / SPIKE_MEMORY_LINES)
        before, self._mean = self._mean, self._mean + weight * (loss - self._mean)
        self._variance += weight * ((loss - before) * (loss - self._mean) - self._variance)
        return above
