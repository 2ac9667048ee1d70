"""Faults of the training itself: steps that are not finite, spikes of the loss, ranks that are slow.

A step whose gradient is not finite is skipped: its rows and its learning rate are used up, weights and
moments stay. After too many in a row the run goes back to its newest checkpoint and passes over the rows
of the skipped steps; where that does not help, over all rows since the checkpoint, as PaLM's authors did
(Chowdhery et al. 2022, section 5.1). A run that still comes back to the same checkpoint is ended. Spikes and
slow ranks are only reported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from pretrain.checkpoint.format import Checkpoint
from pretrain.faults.skipping import BadRows, BadRowsFile
from sharebert_common.recipe import STRICT

SPIKE_MEMORY_LINES = 50
"""Lines over which the running mean and deviation of the loss forget; half as many come before a first report."""

SLOW_LINES = 3
"""Lines in a row over which a rank must be slow to be named: a machine may be busy for a moment."""


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
    """A rank whose own work (waiting for rows, and forward passes) takes so many times the median is named; 0 names
    none."""
    dry_run: bool = True
    """Try the largest micro-batch once before the first step, so that running out of memory shows at the start."""


class TooManyFaults(RuntimeError):
    """The run cannot go on by itself; the message says what was tried."""


class SkippedSteps:
    """Steps skipped one after another, and what follows from too many of them."""

    def __init__(self, recipe: FaultsRecipe, bad_rows: BadRowsFile, report: Callable[[str], None]) -> None:
        self._recipe, self._bad_rows, self._report = recipe, bad_rows, report
        self._forget()

    def _forget(self) -> None:
        self.in_a_row, self._first_row, self._end_row = 0, 0, 0

    def count(self, step: int, rows: range, skipped: bool) -> None:
        """Note how `step` on the positions `rows` went."""
        if not skipped:
            self._forget()
            return
        if not self.in_a_row:
            self._first_row = rows.start
        self.in_a_row += 1
        self._end_row = rows.stop
        self._report(
            f"step {step}: the gradient is not finite; skipped, {self.in_a_row} in a row "
            f"(rows {rows.start} to {rows.stop - 1} of the order)"
        )

    @property
    def too_many(self) -> bool:
        """Whether going on like this makes no sense."""
        return self.in_a_row >= self._recipe.max_skipped

    def give_up_rows(self, step: int, found: Checkpoint | None) -> None:
        """Let the run pass over rows from now on, on going back at `step` to `found`; and count anew.

        Raises TooManyFaults where there is nothing to go back to, or the run went back there often enough.
        """
        skipped = f"step {step}: {self.in_a_row} steps in a row were not finite"
        back_to = found.step if found else 0
        returns = self._bad_rows.returns_to(back_to)
        if returns >= self._recipe.max_returns:
            raise TooManyFaults(
                f"{skipped}, and going back to step {back_to} {returns} times did not help "
                f"(rows tried: {self._bad_rows.path}); lower optimizer.lr, or look at these rows"
            )
        first_since = int(found.training["loader"]["rows_consumed"]) if found else 0
        given_up = BadRows(self._first_row if returns == 0 else first_since, self._end_row, step, back_to)
        self._bad_rows.add(given_up)
        passed_over = f"rows {given_up.first} to {given_up.end - 1} of the order are passed over"
        if found is None:
            raise TooManyFaults(f"{skipped}, and there is no checkpoint to go back to; started again, {passed_over}")
        self._report(f"{skipped}; going back to step {back_to}; {passed_over}")
        self._forget()


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


class SlowRanks:
    """Names a rank whose own work takes much longer than that of the others: all of them wait for it."""

    def __init__(self, factor: float, hosts: Sequence[str], report: Callable[[str], None]) -> None:
        self._limit, self._hosts, self._report = factor, hosts, report
        self._rank, self._lines = -1, 0

    def look(self, step: int, own_work_s: Sequence[float]) -> float | None:
        """How many times the median the slowest rank took for its own work; None for a rank alone."""
        if len(own_work_s) == 1:
            return None
        slowest = max(range(len(own_work_s)), key=own_work_s.__getitem__)
        factor = own_work_s[slowest] / max(statistics.median_low(own_work_s), 1e-9)
        slow = 0 < self._limit < factor
        self._lines = self._lines + 1 if slow and slowest == self._rank else int(slow)
        self._rank = slowest
        if self._lines == SLOW_LINES:
            self._report(
                f"step {step}: rank {slowest} on {self._hosts[slowest]} is slow: rows and forward passes take it "
                f"{factor:.1f} times the median of all ranks, which wait for it"
            )
        return factor
