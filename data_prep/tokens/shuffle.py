"""Shuffle the documents of the whole corpus in two passes on disk, and choose the validation documents.

Pass 1: every part writes its documents in *runs*, each sorted by a random key of the document. Pass 2: a shard is a
range of that key, and reads its range of every run. Memory holds one run or one shard.

A hash of the text decides which documents are for validation, so all copies of a text are in the same split.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.disk import save_array
from sharebert_common.counter_rng import GOLDEN, splitmix64
from sharebert_common.errors import BadInput

RUN_TOKENS = 16 << 20
DOCUMENT = np.dtype([("order", "<u8"), ("split", "<u8"), ("start", "<i8"), ("length", "<i4")])
"""A document in a run: its random key for the order, hash of its text, start and length (with [SEP]) in tokens."""

_BINS = 1 << 16
_BIN_SHIFT = 48
_SEGMENTS = 256
_WRITE_BYTES = 1 << 20
_FEW_SHARDS, _SMALL_SHARD_BYTES = 16, 4 << 20


class RunWriter:
    """Writes the documents of one part in sorted runs.

    Args:
        folder: of the runs.
        part: number of the part; the order key depends on it and on the document's number in the part.
        seed: of the shuffle.
        sep: id of the token at the end of each document.
        dtype: of the tokens.
    """

    def __init__(self, folder: Path, part: int, seed: int, sep: int, dtype: np.dtype[Any]) -> None:
        self._folder, self._part, self._seed, self._sep, self._dtype = folder, part, seed, sep, dtype
        self._tokens: list[NDArray[Any]] = []
        self._documents: list[NDArray[Any]] = []
        self._held = self._runs = 0

    def add(self, numbers: NDArray[np.int64], texts: Sequence[str], ids: NDArray[Any], offsets: NDArray[Any]) -> None:
        """Add documents; a document without any token is left out.

        Args:
            numbers: [n] of the documents in the part.
            texts: n texts.
            ids: of all documents, one after the other.
            offsets: [n + 1] of the first id of each document.
        """
        documents = np.zeros(len(texts), DOCUMENT)
        documents["length"] = np.diff(offsets) + 1
        documents["start"] = offsets[:-1] + np.arange(len(texts)) + self._held
        documents["order"] = order_keys(self._seed, self._part, numbers)
        documents["split"] = [xxhash.xxh3_64_intdigest(text.encode(), self._seed) for text in texts]
        self._documents.append(documents[documents["length"] > 1])
        self._tokens.append(np.insert(ids.astype(self._dtype), offsets[1:], self._sep))
        self._held += len(ids) + len(texts)
        if self._held >= RUN_TOKENS:
            self._flush()

    def close(self) -> None:
        """Write the documents that are still in memory."""
        if self._held:
            self._flush()

    def _flush(self) -> None:
        documents, tokens = np.concatenate(self._documents), np.concatenate(self._tokens)
        documents = documents[np.argsort(documents["order"], kind="stable")]
        with (self._folder / f"run-{self._runs:04d}.tokens.bin").open("wb", _WRITE_BYTES) as file:
            file.writelines(piece.data for piece in slices(tokens, documents["start"], documents["length"]))
        documents["start"] = np.cumsum(documents["length"]) - documents["length"]
        save_array(self._folder / f"run-{self._runs:04d}.documents.npy", documents)
        self._tokens, self._documents, self._held = [], [], 0
        self._runs += 1


@dataclass(frozen=True)
class Layout:
    """Which documents go to which shard: a pure function of the runs and the recipe."""

    validation_below: int
    """Documents whose text hash is below this are for validation."""
    shards: dict[str, list[tuple[int, int]]]
    """For each split and shard, the range of the upper 16 bits of the order key."""
    segments_dtype: str
    """uint16 where a row may hold more than 255 documents."""


def plan_shards(runs: Sequence[Path], validation: float, seq_len: int, token_bytes: int, shard_bytes: int) -> Layout:
    """Choose the validation documents and the key ranges of the shards.

    Args:
        runs: as `list_runs` returns them.
        validation: rows if 1 or more, otherwise a fraction of the tokens; rounded up to documents.
        seq_len: tokens of a row.
        token_bytes: bytes of one token on disk.
        shard_bytes: about the most bytes of a shard.

    Raises BadInput: no document at all, or no document to train on.
    """
    by_split, documents, shortest = np.zeros(_BINS), 0, np.zeros(0, np.int64)
    for run in _documents(runs):
        by_split += np.bincount(_bin(run["split"]), run["length"], _BINS)
        documents += len(run)
        shortest = np.sort(np.concatenate([shortest, run["length"]]))[:_SEGMENTS]
    if not documents:
        raise BadInput("no document is left for a dataset; see the counts above")
    total = by_split.sum()
    wanted = validation * (seq_len - 1) if validation >= 1 else validation * total
    below = _threshold(runs, by_split, wanted) if validation else 0
    by_order = {"train": np.zeros(_BINS), "validation": np.zeros(_BINS)}
    for run in _documents(runs):
        for split, chosen in (("train", run["split"] >= below), ("validation", run["split"] < below)):
            by_order[split] += np.bincount(_bin(run["order"][chosen]), run["length"][chosen], _BINS)
    if not by_order["train"].sum():
        raise BadInput(
            f"validation: {validation} takes all of the {documents} documents; lower it, add text, or split text files "
            "into more documents with source.document: line or paragraph"
        )
    # A row can hold 256 documents: the first may continue from the row before, the last may be cut, 254 are complete.
    crowded = len(shortest) >= _SEGMENTS - 1 and shortest[: _SEGMENTS - 2].sum() < seq_len
    row_token_bytes = token_bytes + (2 if crowded else 1)
    shards = {
        split: _ranges_of_bins(tokens, tokens.sum() * row_token_bytes, shard_bytes)
        for split, tokens in by_order.items()
    }
    return Layout(below, shards, "uint16" if crowded else "uint8")


@dataclass(frozen=True)
class ShardText:
    """One shard's documents in final order: `tokens[starts[i] : starts[i] + lengths[i]]`, each ending with [SEP]."""

    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


def gather(
    runs: Sequence[Path], split: str, bins: tuple[int, int], validation_below: int, dtype: np.dtype[Any]
) -> ShardText:
    """Read one shard's documents from all runs. Raises BadInput if a run is not as it was written."""
    found, spans, held = [], [], 0
    for path in runs:
        documents = _mapped(path)
        first, last = (bisect_left(documents["order"], edge << _BIN_SHIFT) for edge in bins)
        chosen = np.array(documents[first:last])
        chosen = chosen[(chosen["split"] < validation_below) == (split == "validation")]
        if len(chosen):
            stops = chosen["start"] + chosen["length"]
            breaks = np.flatnonzero(chosen["start"][1:] != stops[:-1]) + 1
            spans.append((path, chosen["start"][[0, *breaks]], stops[[*(breaks - 1), -1]]))
            chosen["start"] = held + np.cumsum(chosen["length"]) - chosen["length"]
            held += int(chosen["length"].sum())
            found.append(chosen)
    tokens, at = np.empty(held, dtype), 0
    for path, starts, stops in spans:
        with _tokens_of(path).open("rb") as file:  # read, not mapped: mapped pages count as memory
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                file.seek(start * dtype.itemsize)
                count = stop - start
                if file.readinto(tokens[at : at + count].view(np.uint8).data) != count * dtype.itemsize:
                    raise BadInput(f"{_tokens_of(path)}: cut short; delete the folder {path.parents[3]} and run again")
                at += count
    documents = np.concatenate(found)
    documents = documents[np.argsort(documents["order"], kind="stable")]
    return ShardText(tokens, documents["start"], documents["length"].astype(np.int64))


def list_runs(folders: Sequence[Path]) -> list[Path]:
    """The runs of all parts, in order."""
    return [run for folder in folders for run in sorted(folder.glob("run-*.documents.npy"))]


def order_keys(seed: int, part: int, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A random 64-bit key for each document of a part: SplitMix64 over (seed, part, number)."""
    stream = splitmix64(splitmix64(np.array([seed], np.uint64)) + np.uint64(part))
    return splitmix64(stream + numbers.astype(np.uint64) * GOLDEN)


def slices(tokens: NDArray[Any], starts: NDArray[np.int64], lengths: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """`tokens[starts[i] : starts[i] + lengths[i]]` for every i. To copy slices is faster than an index of tokens."""
    for start, stop in zip(starts.tolist(), (starts + lengths).tolist(), strict=True):
        yield tokens[start:stop]


def _documents(runs: Sequence[Path]) -> Iterator[NDArray[Any]]:
    for path in runs:
        yield np.load(path)


@lru_cache(maxsize=256)  # one open file each; a process may have 1,024
def _mapped(path: Path) -> NDArray[Any]:
    return np.asarray(np.load(path, mmap_mode="r"))


def _bin(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (keys >> np.uint64(_BIN_SHIFT)).astype(np.int64)


def _tokens_of(run: Path) -> Path:
    return run.with_name(run.name.replace(".documents.npy", ".tokens.bin"))


def _threshold(runs: Sequence[Path], tokens_by_bin: NDArray[Any], wanted: float) -> int:
    """The smallest key so that the documents with smaller keys hold at least `wanted` tokens, or all that there are."""
    sums = np.cumsum(tokens_by_bin)
    at = int(np.searchsorted(sums, min(wanted, sums[-1])))
    within = np.concatenate([run[_bin(run["split"]) == at] for run in _documents(runs)])
    within = np.sort(within, order="split")
    sums_within = np.cumsum(within["length"]) + (sums[at - 1] if at else 0)
    return int(within["split"][min(int(np.searchsorted(sums_within, wanted)), len(within) - 1)]) + 1


def _ranges_of_bins(tokens_by_bin: NDArray[Any], total_bytes: float, shard_bytes: int) -> list[tuple[int, int]]:
    """Divide the bins into shards of about equal numbers of tokens, none of them empty."""
    sums = np.cumsum(tokens_by_bin)
    if not sums[-1]:
        return []
    # A small corpus has several shards too, so that workers and nodes can share them.
    count = max(-(-int(total_bytes) // shard_bytes), min(_FEW_SHARDS, int(total_bytes) // _SMALL_SHARD_BYTES), 1)
    inner = np.unique(np.searchsorted(sums, sums[-1] * np.arange(1, count) / count) + 1)
    edges = [0, *(int(edge) for edge in inner if sums[edge - 1] < sums[-1]), _BINS]
    return list(pairwise(edges))
