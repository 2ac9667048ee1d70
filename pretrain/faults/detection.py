"""Faults that are reported and not acted on: spikes of the loss, and ranks that are slow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

SPIKE_MEMORY_LINES = 50
"""Log lines that the running mean and deviation of the loss remember. Reports begin after half as many."""

SLOW_LINES = 3
"""Log lines in a row for which a rank must be slow before it is reported: a machine may be busy for a moment."""


class SpikeDetector:
    """Keeps a running mean and deviation of the logged losses, and reports a loss far above them."""

    def __init__(self, deviations: float, report: Callable[[str], None]) -> None:
        self._limit, self._report = deviations, report
        self._lines, self._mean, self._variance = 0, 0.0, 0.0

    def look(self, step: int, loss: float) -> float | None:
        """How many deviations `loss` is above the mean of the earlier lines; None while there are too few of them."""
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
    """Reports a rank whose own work takes much longer than that of the others, which all wait for it."""

    def __init__(self, factor: float, hosts: Sequence[str], report: Callable[[str], None]) -> None:
        self._limit, self._hosts, self._report = factor, hosts, report
        self._rank, self._lines = -1, 0

    def look(self, step: int, own_work_s: Sequence[float]) -> float | None:
        """The slowest rank's own work over the median; None with one rank."""
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
