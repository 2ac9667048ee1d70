"""Hashes of all word n-grams of many texts at once, for repetition, near duplicates and overlap with evaluation sets.

Words are runs of letters and digits in lower case (every byte outside ASCII counts as a letter), so spacing and
punctuation do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_TABLE = bytes(b if b >= 0x80 or chr(b).isalnum() else 0x20 for b in range(256))
_CHUNK_BYTES = 1 << 18  # arrays of 8 bytes a byte stay in the cache, and small for a document of any size
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd: multiplication by its powers loses no bit
_POWERS = np.cumprod(np.full(_CHUNK_BYTES, _MULTIPLIER, np.uint64))
_INVERSES = np.cumprod(np.full(_CHUNK_BYTES, pow(_MULTIPLIER, -1, 1 << 64), np.uint64))


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a random-looking 64-bit number for each."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def ngram_hashes(
    texts: Sequence[str], n: int, whole_if_short: bool = False
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of the n-grams of each text, in order.

    Args:
        texts: any number of them.
        n: words of an n-gram.
        whole_if_short: a text of 1 to n - 1 words gives one hash, of all its words; else none.

    Returns: hashes of all texts, one after the other; offsets [texts + 1] of each one's first.
    """
    data = [_lower(text) for text in texts]
    ends = np.cumsum([len(piece) + 1 for piece in data], dtype=np.int64)
    joined = b" ".join(data)
    del data
    words, starts = _word_hashes(joined)
    counts = np.diff(np.searchsorted(starts, ends), prepend=0)
    first = np.cumsum(counts) - counts
    sums = np.zeros(max(len(words) - n + 1, 0), np.uint64)
    for k in range(n):
        sums += words[k : k + len(sums)] * _POWERS[k]
    grams = np.maximum(counts - n + 1, 0)
    offsets = np.concatenate([[0], np.cumsum(grams)])
    chosen = np.repeat(first - offsets[:-1], grams) + np.arange(offsets[-1])
    hashes = mix(sums[chosen])
    if whole_if_short:
        short = np.flatnonzero((counts > 0) & (counts < n))
        spans = [words[first[i] : first[i] + counts[i]] for i in short]
        whole = np.array([(span * _POWERS[: len(span)]).sum() for span in spans], np.uint64)
        hashes = np.insert(hashes, offsets[short], mix(whole))
        grams[short] = 1
        offsets = np.concatenate([[0], np.cumsum(grams)])
    return hashes, offsets


def _lower(text: str) -> bytes:
    """The words of a text in lower case, in UTF-8, with a space for every byte of a separator."""
    if len(text) <= _CHUNK_BYTES:
        return text.lower().encode().translate(_TABLE)
    pieces = (text[i : i + _CHUNK_BYTES] for i in range(0, len(text), _CHUNK_BYTES))
    return b"".join(piece.lower().encode().translate(_TABLE) for piece in pieces)


def _word_hashes(data: bytes) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(hash, first byte) of every word of text whose separators are all spaces."""
    hashes, starts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    at = 0
    while at < len(data):
        stop = len(data) if len(data) - at <= _CHUNK_BYTES else data.rfind(b" ", at, at + _CHUNK_BYTES) + 1
        if stop <= at:
            stop = at + _CHUNK_BYTES  # a "word" of so many bytes is cut
        chunk = np.frombuffer(data, np.uint8, stop - at, at)
        edges = np.diff((chunk != 0x20).astype(np.int8), prepend=0, append=0)
        begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        if len(begins):
            letters = chunk[chunk != 0x20]
            lengths = ends - begins
            before = np.cumsum(lengths) - lengths
            # The k-th letter of the chunk counts times m**k; dividing by m**before makes a word's hash its own.
            terms = letters * _POWERS[: len(letters)]
            hashes.append(mix(np.add.reduceat(terms, before) * _INVERSES[before]))
            starts.append(begins + at)
        at = stop
    return np.concatenate(hashes), np.concatenate(starts)
