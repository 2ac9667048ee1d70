"""Which row stands at which position: a shuffle with no permutation array over rows.

The shards are permuted for the epoch. Rows are permuted inside windows of W shards by a Feistel
network over a × b ≥ n with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", CT-RSA 2002, method 3, generalised Feistel), evaluated at the position. So memory and the
time to start anywhere do not depend on the number of rows, and an epoch goes through the shards W at
a time. docs/format.md carries the definition and test vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sharebert_common.counter_rng import U64, Stream, draw, key

I64 = NDArray[np.int64]

ROUNDS = 12
"""With 12, the images of two indices are jointly uniform at every size tried, from 4 rows on; with 6, windows of
30 rows are 18 standard deviations off in a chi-square test, and windows of 100 still 4.5."""


class Order:
    """The order of one split: position → (epoch, row), positions running on across epochs.

    Args:
        shard_rows: rows of every shard, in manifest order.
        seed: of the run; 0 ≤ seed < 2^64.
        window_shards: W, how many shards are mixed with each other.
    """

    def __init__(self, shard_rows: Sequence[int], seed: int, window_shards: int) -> None:
        self._shard_rows = np.asarray(shard_rows, dtype=np.int64)
        self._first_row = np.cumsum(self._shard_rows) - self._shard_rows
        self._seed = seed
        self._window_shards = window_shards
        self.rows = int(self._shard_rows.sum())
        self._plan = _EpochPlan(self._shard_rows, seed, 0, window_shards)

    def at(self, positions: I64) -> tuple[I64, I64]:
        """The epochs [n] and global row numbers [n] at `positions` [n]."""
        epochs, places = np.divmod(positions, self.rows)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            if self._plan.epoch != epoch:
                self._plan = _EpochPlan(self._shard_rows, self._seed, int(epoch), self._window_shards)
            here = epochs == epoch
            shards, within = self._plan.at(places[here])
            rows[here] = self._first_row[shards] + within
        return epochs, rows


class _EpochPlan:
    """What an epoch needs to know: a few numbers a shard and a window."""

    def __init__(self, shard_rows: I64, seed: int, epoch: int, window_shards: int) -> None:
        self.epoch = epoch
        shards = np.arange(len(shard_rows))
        self._shards = np.argsort(draw(key(seed, Stream.SHARDS, epoch), shards), kind="stable")
        self._shard_end = np.cumsum(shard_rows[self._shards])
        self._shard_start = self._shard_end - shard_rows[self._shards]
        self._window_start = self._shard_start[::window_shards]
        self._window_rows = np.diff(self._window_start, append=self._shard_end[-1])
        self._window_end = self._window_start + self._window_rows
        window_keys = key(seed, Stream.ROWS, epoch, np.arange(len(self._window_start)))
        self._round_keys = draw(window_keys[:, None], np.arange(ROUNDS))

    def at(self, places: I64) -> tuple[I64, I64]:
        """The shards [n] and the rows inside them [n] at `places` [n] of this epoch."""
        windows = np.searchsorted(self._window_end, places, side="right")
        starts = self._window_start[windows]
        shuffled = permute(places - starts, self._window_rows[windows], self._round_keys[windows]) + starts
        found = np.searchsorted(self._shard_end, shuffled, side="right")
        return self._shards[found], shuffled - self._shard_start[found]


def permute(index: I64, size: I64, round_keys: U64) -> I64:
    """Where a keyed bijection of 0 … size-1 sends `index`, element by element.

    With a = ⌈√size⌉ and b = ⌈size/a⌉, x = left·b + right goes through rounds that add a hash of one
    half to the other; what falls outside `size` (less than one in √size) goes through again.

    Args:
        index: [n], 0 ≤ index < size.
        size: [n].
        round_keys: [n, ROUNDS].
    """
    a = np.ceil(np.sqrt(size)).astype(np.uint64)
    end = size.astype(np.uint64)
    b = (end + a - np.uint64(1)) // a
    result = np.empty_like(index)
    walking = np.arange(len(index))
    x = index.astype(np.uint64)
    while len(walking):
        left, right = np.divmod(x, b)
        for number in range(0, ROUNDS, 2):
            left = (left + draw(round_keys[:, number], right) % a) % a
            right = (right + draw(round_keys[:, number + 1], left) % b) % b
        x = left * b + right
        outside = x >= end
        result[walking] = x
        walking, x, a, b, end, round_keys = (v[outside] for v in (walking, x, a, b, end, round_keys))
    return result
