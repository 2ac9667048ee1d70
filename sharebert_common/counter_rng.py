"""Random numbers and hashes that are pure functions of their inputs: no state, no order of calls.

SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, with Stafford's mix 13),
used as a counter-based generator: number `counter` of the stream of a key is computed directly. Arithmetic is modulo
2^64. docs/format.md holds the definition and test vectors.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

U64 = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Stream(IntEnum):
    """What random numbers are used for. The streams of one seed are independent of each other."""

    SHARDS = 1
    ROWS = 2
    MASKS = 3


def mix(x: U64) -> U64:
    """A bijection of 64-bit numbers that spreads every input bit over all of them; works in place."""
    shifted = np.empty_like(x)
    np.right_shift(x, np.uint64(30), out=shifted)
    x ^= shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(x, np.uint64(27), out=shifted)
    x ^= shifted
    x *= np.uint64(0x94D049BB133111EB)
    np.right_shift(x, np.uint64(31), out=shifted)
    x ^= shifted
    return x


def splitmix64(x: U64) -> U64:
    """SplitMix64's output for each state of `x` [any shape], a random-looking 64-bit number: mix(x + GOLDEN)."""
    return mix(x + GOLDEN)


def key(seed: int, stream: Stream, *parts: ArrayLike) -> U64:
    """The keys of a stream, one for each element of the broadcast `parts` (for example epoch and row).

    k = 0; for every v of (seed, stream, *parts): k = mix((k + GOLDEN) xor v).
    """
    result = np.zeros(1, np.uint64)
    for part in (seed, int(stream), *parts):
        result = mix((result + GOLDEN) ^ np.asarray(part, dtype=np.uint64))
    return result


def draw(keys: U64, counters: ArrayLike) -> U64:
    """Number `counters` of the streams of `keys`, broadcast: mix(key + (counter + 1) · GOLDEN)."""
    steps = np.atleast_1d(np.asarray(counters, dtype=np.uint64))  # NumPy warns of overflow of scalars
    return mix(keys + (steps + np.uint64(1)) * GOLDEN)
