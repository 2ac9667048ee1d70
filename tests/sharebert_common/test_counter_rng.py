"""Hashes are SplitMix64's, and those of docs/format.md."""

from __future__ import annotations

import format_by_hand as by_hand
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sharebert_common.counter_rng import Stream, draw, key

U64 = st.integers(0, 2**64 - 1)


def test_vectors_of_the_document() -> None:
    vectors = by_hand.vectors("hashing")
    for (seed, stream, *parts), expected in vectors["key"]:
        assert int(key(seed, Stream(stream), *parts)[0]) == int(expected, 16)
    for k, counter, expected in vectors["draw"]:
        assert int(draw(np.array([int(k, 16)], np.uint64), counter)[0]) == int(expected, 16)


@settings(deadline=None)
@given(seed=U64, epoch=st.integers(0, 2**40), row=U64, counter=st.integers(0, 2**40))
def test_equals_the_transcription(seed: int, epoch: int, row: int, counter: int) -> None:
    for stream in Stream:
        k = key(seed, stream, epoch, [row])
        assert int(k[0]) == by_hand.key(seed, int(stream), epoch, row)
        assert int(draw(k, counter)[0]) == by_hand.draw(int(k[0]), counter)


def test_keys_are_made_for_arrays_of_parts() -> None:
    rows = np.arange(5)
    np.testing.assert_array_equal(
        key(3, Stream.MASKS, 2, rows), np.concatenate([key(3, Stream.MASKS, 2, row) for row in rows])
    )


def test_a_key_is_not_changed_by_drawing() -> None:
    k = key(3, Stream.MASKS, 2)
    before = k.copy()
    draw(k, np.arange(4))
    np.testing.assert_array_equal(k, before)
