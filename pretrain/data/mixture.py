"""Which of several datasets the row at a position comes from.

A fixed pattern, so that any position is found at once and every stretch of positions holds the
datasets in the proportion of their weights. docs/format.md carries the definition and test vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]

SLOTS = 65_536


class Mixture:
    """The dataset of each position, by weight.

    Weights become whole numbers of slots out of `SLOTS`, divided by what they have in common: the
    pattern that repeats for ever. The i-th of a dataset's c slots belongs at (i + 1/2)/c of the
    pattern, and slots stand in that order, those of the first dataset first where two coincide.

    Args:
        weights: of the datasets, positive, in any unit.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        slots = _apportion(weights)
        self.slots = slots // np.gcd.reduce(slots)
        dataset = np.repeat(np.arange(len(weights)), self.slots)
        turn = np.concatenate([np.arange(count) for count in self.slots])
        pattern = np.lexsort((dataset, (turn + 0.5) / self.slots[dataset]))
        self._dataset, self._turn = dataset[pattern], turn[pattern]

    def at(self, positions: I64) -> tuple[I64, I64]:
        """The datasets [n] at `positions` [n], and the positions [n] in those datasets' own orders."""
        repeats, slot = np.divmod(positions, len(self._dataset))
        dataset = self._dataset[slot]
        return dataset, repeats * self.slots[dataset] + self._turn[slot]

    def before(self, position: int) -> I64:
        """How many of the positions before `position` belong to each dataset, [datasets]."""
        repeats, slot = divmod(position, len(self._dataset))
        return repeats * self.slots + np.bincount(self._dataset[:slot], minlength=len(self.slots))


def _apportion(weights: Sequence[float]) -> I64:
    """`SLOTS` shared out by largest remainder, after one slot for each dataset."""
    shares = np.asarray(weights) / sum(weights) * (SLOTS - len(weights))
    slots = np.floor(shares).astype(np.int64)
    slots[np.argsort(slots - shares, kind="stable")[: SLOTS - len(weights) - slots.sum()]] += 1
    return slots + 1
