"""Hashes of all word n-grams of many texts at once, for repetition, near duplicates and decontamination.

What a word is: see `words`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_prep.filter.words import words
from sharebert_common.counter_rng import GOLDEN, splitmix64

_CHUNK_BYTES = 1 << 18  # arrays take 8 bytes for each: small enough for the CPU cache, for any document
_MULTIPLIER = int(GOLDEN)  # odd, so multiplication by its powers loses no bit
_POWERS = np.cumprod(np.full(_CHUNK_BYTES, _MULTIPLIER, np.uint64))
_INVERSES = np.cumprod(np.full(_CHUNK_BYTES, pow(_MULTIPLIER, -1, 1 << 64), np.uint64))


def ngram_hashes(
    texts: Sequence[str], n: int, whole_if_short: bool = False
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of the n-grams of each text, in order.

    Args:
        texts: any number of them.
        n: words of an n-gram.
        whole_if_short: whether a text of 1 to n - 1 words gives one hash, of all its words, or none.

    Returns: hashes of all texts, one after the other; offsets [texts + 1] of each one's first.
    """
    data = [words(text) for text in texts]
    ends = np.cumsum([len(piece) + 1 for piece in data], dtype=np.int64)
    joined = b" ".join(data)
    del data
    hashed, starts = _word_hashes(joined)
    counts = np.diff(np.searchsorted(starts, ends), prepend=0)
    # Of a text of short words, each of these arrays takes 4 bytes for each of its bytes.
    del joined, starts
    first = np.cumsum(counts) - counts
    sums = np.zeros(max(len(hashed) - n + 1, 0), np.uint64)
    for k in range(n):
        sums += hashed[k : k + len(sums)] * _POWERS[k]
    within = np.ones(len(sums), bool)
    for k in range(min(n - 1, len(hashed))):  # these begin in a text and end in the next one
        last = (first + counts - 1 - k)[counts > k]
        within[last[last < len(within)]] = False
    grams = np.maximum(counts - n + 1, 0)
    offsets = np.concatenate([[0], np.cumsum(grams)])
    hashes = sums[within]
    del sums, within
    hashes = splitmix64(hashes)
    if whole_if_short:
        short = np.flatnonzero((counts > 0) & (counts < n))
        spans = [hashed[first[i] : first[i] + counts[i]] for i in short]
        whole = np.array([(span * _POWERS[: len(span)]).sum() for span in spans], np.uint64)
        hashes = np.insert(hashes, offsets[short], splitmix64(whole))
        grams[short] = 1
        offsets = np.concatenate([[0], np.cumsum(grams)])
    return hashes, offsets


def _word_hashes(data: bytes) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(hash, first byte) of every word of text whose separators are all spaces."""
    hashes, starts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    at = 0
    while at < len(data):
        stop = len(data) if len(data) - at <= _CHUNK_BYTES else data.rfind(b" ", at, at + _CHUNK_BYTES) + 1
        if stop <= at:
            stop = at + _CHUNK_BYTES  # a "word" of this length is cut
        chunk = np.frombuffer(data, np.uint8, stop - at, at)
        edges = np.diff((chunk != 0x20).astype(np.int8), prepend=0, append=0)
        begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        if len(begins):
            letters = chunk[chunk != 0x20]
            lengths = ends - begins
            before = np.cumsum(lengths) - lengths
            # Letter k of the chunk counts times m**k. Dividing by m**before makes a hash independent of its place.
            terms = letters * _POWERS[: len(letters)]
            hashes.append(splitmix64(np.add.reduceat(terms, before) * _INVERSES[before]))
            starts.append(begins + at)
        at = stop
    return np.concatenate(hashes), np.concatenate(starts)
