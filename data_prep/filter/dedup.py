"""Find duplicates in the whole corpus, in bounded memory: exact ones, and near ones by MinHash and bands.

A document has one key for its exact text, and one key for each band of its MinHash signature (Broder 1997; Leskovec,
Rajaraman, Ullman, Mining of Massive Datasets, chapter 3). Each part writes its keys to disk, sorted. Then each range
of keys is read from all parts: documents with the same key are copies, or, for the keys of bands, are likely to have
the wanted similarity. All of them but the first in source and document order are dropped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.disk import save_array
from data_prep.filter.clean import CleanRecipe
from data_prep.filter.ngrams import ngram_hashes
from data_prep.read.documents import Batch
from sharebert_common.counter_rng import splitmix64

KEY = np.dtype([("key", "<u8"), ("check", "<u4"), ("number", "<u4")])
"""96 bits of hash, and the document's number in its part. Among 10**10 texts no two hashes are equal by chance."""

PLACE = np.dtype([("part", "<u4"), ("number", "<u4")])
RANGE_KEYS = 8 << 20  # keys of a range: under 1 GB with the memory for sorting
NGRAM = 5

_PERMUTATIONS = 128
_SIGNATURE_SEED = 1


class KeyWriter:
    """Writes the keys of the documents of one part in sorted runs, RULE-0000.npy …"""

    def __init__(self, folder: Path, config: CleanRecipe) -> None:
        self._folder, self._config = folder, config
        self._held: dict[str, list[NDArray[Any]]] = {rule: [] for rule in rules(config)}
        self._runs = 0
        self.keys = 0

    def add(self, batch: Batch) -> None:
        """Add documents."""
        for rule, held in self._held.items():
            held.append(exact_keys(batch) if rule == "exact" else near_keys(batch, self._config.near_duplicates or 1))
            self.keys += len(held[-1])
        if sum(len(keys) for held in self._held.values() for keys in held) >= RANGE_KEYS // 2:
            self.flush()

    def flush(self) -> None:
        """Write the keys that are still in memory."""
        for rule, held in self._held.items():
            keys = np.concatenate([np.zeros(0, KEY), *held])
            save_array(self._folder / f"{rule}-{self._runs:04d}.npy", keys[np.argsort(keys["key"], kind="stable")])
            held.clear()
        self._runs += 1


def rules(config: CleanRecipe) -> list[str]:
    """The kinds of duplicates that the config drops; a document is counted under the first that applies."""
    return ["exact"] * config.exact_duplicates + ["near"] * (config.near_duplicates is not None)


def exact_keys(batch: Batch) -> NDArray[Any]:
    """Keys [n] of the texts, one for each document."""
    keys = np.zeros(len(batch.texts), KEY)
    keys["number"] = batch.numbers
    for i, text in enumerate(batch.texts):
        digest = xxhash.xxh3_128_intdigest(text.encode())
        keys[i]["key"], keys[i]["check"] = digest >> 64, digest & 0xFFFFFFFF
    return keys


def near_keys(batch: Batch, similarity: float) -> NDArray[Any]:
    """Keys [n * bands], one for each band of each document's signature; documents without a word have none."""
    import rensa

    bands, rows = bands_for(similarity)
    hashes, offsets = ngram_hashes(batch.texts, NGRAM, whole_if_short=True)
    filled = np.flatnonzero(np.diff(offsets))
    signatures = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, _PERMUTATIONS, _SIGNATURE_SEED)
    values = np.array(signatures.to_rows(), np.uint64).reshape(-1, _PERMUTATIONS)[filled, : bands * rows]
    folded = np.broadcast_to(np.arange(bands, dtype=np.uint64), (len(filled), bands))
    for row in range(rows):
        folded = splitmix64(folded ^ values[:, row::rows])
    keys = np.zeros((len(filled), bands), KEY)
    keys["number"] = batch.numbers[filled, None]
    keys["key"], keys["check"] = folded, splitmix64(folded) & np.uint64(0xFFFFFFFF)
    return keys.reshape(-1)


def bands_for(similarity: float) -> tuple[int, int]:
    """(bands, rows of a band) with which pairs become candidates at about this Jaccard similarity.

    Two documents of similarity s share a band with probability 1 - (1 - s**rows)**bands. This returns the
    numbers with the smallest area of errors on both sides of the wanted similarity; a missed copy counts four times.
    """
    s = (np.arange(1000) + 0.5) / 1000
    best = (np.inf, 1, 1)
    for rows in range(1, _PERMUTATIONS + 1):
        bands = _PERMUTATIONS // rows
        found = 1 - (1 - s**rows) ** bands
        error = float(found[s < similarity].sum() + 4 * (1 - found[s >= similarity]).sum())
        best = min(best, (error, bands, rows))
    return best[1], best[2]


def repeated(folders: Sequence[Path], rule: str, number: int, ranges: int) -> NDArray[Any]:
    """Places [n] (PLACE, sorted) of documents that have the key of an earlier document, for one range of keys.

    Args:
        folders: of all parts, in order, with what `KeyWriter` wrote.
        rule: "exact" or "near".
        number: which range.
        ranges: number of ranges.
    """
    edges = (number << 64) // ranges, ((number + 1) << 64) // ranges
    keys, parts = [np.zeros(0, KEY)], [np.zeros(0, np.uint32)]
    for number_of_part, folder in enumerate(folders):
        for file in sorted(folder.glob(f"{rule}-*.npy")):
            run = np.load(file, mmap_mode="r")
            first, last = (bisect_left(run["key"], edge) for edge in edges)
            keys.append(np.array(run[first:last]))
            parts.append(np.full(last - first, number_of_part, np.uint32))
    key, part = np.concatenate(keys), np.concatenate(parts)
    order = np.lexsort((key["number"], part, key["check"], key["key"]))
    key, part = key[order], part[order]
    same = np.flatnonzero((key["key"][1:] == key["key"][:-1]) & (key["check"][1:] == key["check"][:-1])) + 1
    places = np.zeros(len(same), PLACE)
    places["part"], places["number"] = part[same], key["number"][same]
    return np.unique(places)


def dropped(files: Sequence[Path], part: int) -> NDArray[np.int64]:
    """Sorted numbers of the documents of a part that are in any of these files of places."""
    found = [np.zeros(0, np.int64)]
    for file in files:
        places = np.load(file, mmap_mode="r")
        first, last = bisect_left(places["part"], part), bisect_left(places["part"], part + 1)
        found.append(places["number"][first:last].astype(np.int64))
    return np.unique(np.concatenate(found))
