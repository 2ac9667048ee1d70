"""The definitions of docs/format.md, one row and one number at a time. Tests compare the vectorised code with it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parent.parent / "docs" / "format.md"

TWO64 = 2**64
GOLDEN = 0x9E3779B97F4A7C15
SHARDS, ROWS, MASKS = 1, 2, 3


def vectors(name: str) -> Any:
    """The block of test vectors of that name in the document."""
    (block,) = re.findall(rf"```json {name}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return json.loads(block)


def mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % TWO64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % TWO64
    return x ^ x >> 31


def key(*values: int) -> int:
    k = 0
    for value in values:
        k = mix((k + GOLDEN) % TWO64 ^ value)
    return k


def draw(k: int, counter: int) -> int:
    return mix((k + (counter + 1) * GOLDEN) % TWO64)


def permute(i: int, n: int, k: int) -> int:
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    while True:
        left, right = divmod(i, b)
        for number in range(12):
            round_key = draw(k, number)
            if number % 2 == 0:
                left = (left + draw(round_key, right) % a) % a
            else:
                right = (right + draw(round_key, left) % b) % b
        i = left * b + right
        if i < n:
            return i


def row_at(shard_rows: Sequence[int], seed: int, window_shards: int, position: int) -> tuple[int, int]:
    """(epoch, row) at a position."""
    epoch, place = divmod(position, sum(shard_rows))
    shard_key = key(seed, SHARDS, epoch)
    shards = sorted(range(len(shard_rows)), key=lambda s: (draw(shard_key, s), s))
    for window, first in enumerate(range(0, len(shards), window_shards)):
        members = shards[first : first + window_shards]
        rows = [sum(shard_rows[:s]) + r for s in members for r in range(shard_rows[s])]
        if place < len(rows):
            return epoch, rows[permute(place, len(rows), key(seed, ROWS, epoch, window))]
        place -= len(rows)
    raise AssertionError


def pattern(slots: Sequence[int]) -> list[int]:
    """The dataset of each slot."""
    return [
        d for _, d in sorted((Fraction(2 * i + 1, 2 * count), d) for d, count in enumerate(slots) for i in range(count))
    ]


def mask(
    tokens: Sequence[int],
    document_ids: Sequence[int],
    *,
    seed: int,
    epoch: int,
    row: int,
    rate: float,
    vocab_size: int,
    special_ids: Sequence[int],
    mask_id: int,
    continues: Sequence[bool] | None = None,
    below: tuple[int, int] = (3_435_973_836, 3_865_470_566),
) -> tuple[list[int], list[int]]:
    """(columns chosen, tokens as the model sees them)."""
    ordinary = [s != 0 and t not in special_ids for t, s in zip(tokens, document_ids, strict=True)]
    k = key(seed, MASKS, epoch, row)
    low_bits = 2 ** (len(tokens) - 1).bit_length()
    ranks = []
    for column, token in enumerate(tokens):
        assert token < vocab_size
        start = column
        if continues is not None:
            while start > 0 and continues[tokens[start]]:
                start -= 1
        high, low = divmod(draw(k, start // 2), 2**32)
        number = high if start % 2 else low
        if ordinary[column]:
            ranks.append(number // low_bits * low_bits + column)
    wanted = max(1, round(rate * sum(s != 0 for s in document_ids)))
    columns = sorted(rank % low_bits for rank in sorted(ranks)[:wanted])
    words = [t for t in range(vocab_size) if t not in special_ids]
    seen = list(tokens)
    for column in columns:
        high, low = divmod(draw(k, 2**32 + column), 2**32)
        if high < below[0]:
            seen[column] = mask_id
        elif high < below[1]:
            seen[column] = words[low * len(words) >> 32]
    return columns, seen
