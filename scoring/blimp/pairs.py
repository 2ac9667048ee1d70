"""BLiMP's pairs of an acceptable and an unacceptable sentence (Warstadt et al., TACL 2020), from files or the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from scoring.table_files import read_table
from sharebert_common.errors import BadInput

HUB = "nyu-mll/blimp"
GOOD, BAD, FIELD, TERM, UID = "sentence_good", "sentence_bad", "field", "linguistics_term", "UID"
KINDS = (FIELD, TERM, UID)
"""Keys of a pair by which scores are grouped, from the coarsest to the finest."""
DRAW_SEED = 0
"""Draws the pairs of a subset: they are the same for every model and machine."""


@dataclass(frozen=True)
class Paradigm:
    """The pairs of one UID: they differ in one phenomenon."""

    uid: str
    field: str
    term: str
    pairs: list[tuple[str, str]]
    """The acceptable and the unacceptable sentence of each pair."""

    def group(self, kind: str) -> str:
        """Its field, linguistics term or UID."""
        return {FIELD: self.field, TERM: self.term, UID: self.uid}[kind]


def read_paradigms(path: str | None, count: int | None = None) -> list[Paradigm]:
    """All paradigms, by UID.

    Args:
        path: a folder with BLiMP's jsonl files, or one such file; None: `nyu-mll/blimp` on the hub.
        count: take this many pairs of each paradigm. A larger subset contains every smaller one.

    Raises BadInput, naming file and line: missing files or keys, or a paradigm with fewer than `count` pairs.
    """
    found: dict[str, Paradigm] = {}
    for row, place in _from_hub() if path is None else _from_files(Path(path)):
        for key in (GOOD, BAD, *KINDS):
            if not isinstance(row.get(key), str):
                raise BadInput(f"{place}: no text under '{key}'; a pair of BLiMP has {', '.join((GOOD, BAD, *KINDS))}")
        paradigm = found.setdefault(row[UID], Paradigm(row[UID], row[FIELD], row[TERM], []))
        if (row[FIELD], row[TERM]) != (paradigm.field, paradigm.term):
            raise BadInput(f"{place}: another {FIELD} or {TERM} than in earlier pairs of {row[UID]}")
        paradigm.pairs.append((row[GOOD], row[BAD]))
    return [_subset(found[uid], count) for uid in sorted(found)]


def accuracy(scores: Sequence[tuple[float, float]]) -> float:
    """The share of pairs whose acceptable sentence has the higher score; a tie counts a half."""
    return mean(1.0 if good > bad else 0.5 if good == bad else 0.0 for good, bad in scores)


def by_kind(paradigms: Sequence[Paradigm], accuracies: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The mean accuracy over the paradigms of each field, of each linguistics term, and the accuracy of each UID."""
    groups = {kind: sorted({paradigm.group(kind) for paradigm in paradigms}) for kind in KINDS}
    return {
        kind: {name: mean(accuracies[p.uid] for p in paradigms if p.group(kind) == name) for name in names}
        for kind, names in groups.items()
    }


def _subset(paradigm: Paradigm, count: int | None) -> Paradigm:
    if count is None:
        return paradigm
    if count > len(paradigm.pairs):
        raise BadInput(f"blimp.pairs: {paradigm.uid} has {len(paradigm.pairs)} pairs, fewer than {count}")
    drawn = np.random.default_rng(DRAW_SEED).permutation(len(paradigm.pairs))[:count]
    return Paradigm(paradigm.uid, paradigm.field, paradigm.term, [paradigm.pairs[row] for row in sorted(drawn)])


def _from_files(path: Path) -> list[tuple[dict[str, Any], str]]:
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(path.glob("*.jsonl")) or sorted(path.glob("data/*.jsonl"))
    else:
        raise BadInput(f"data.path: {path}: no such file or folder")
    if not files:
        raise BadInput(f"data.path: {path}: there is no .jsonl file in it; BLiMP has one for each paradigm")
    found = []
    for file in files:
        table = read_table(file, (), ())
        for row, place in enumerate(table.places):
            found.append(({name: values[row] for name, values in table.columns.items()}, f"{file}, {place}"))
    return found


def _from_hub() -> list[tuple[dict[str, Any], str]]:
    import datasets

    found = []
    try:
        for name in datasets.get_dataset_config_names(HUB):
            rows = datasets.load_dataset(HUB, name)["train"]
            found += [(dict(row), f"{HUB}, {name}, row {number}") for number, row in enumerate(rows, 1)]
    except Exception as error:  # any error of the network, the hub or the cache
        cause = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        raise BadInput(
            f"{HUB}: cannot be loaded from the hub ({cause}); to read files instead: --data FOLDER"
        ) from error
    return found
