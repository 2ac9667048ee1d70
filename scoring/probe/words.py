"""Rows of text without capitals and punctuation; what was taken away is the label of each word.

So any text in a script with capitals is labelled data. The labels follow from the text alone: models with other
tokenizers are given the same words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scoring.recipe import ProbeRecipe, TaskDataRecipe
from scoring.table_files import SUFFIXES, read_table
from sharebert_common.encodings import decode_utf8
from sharebert_common.errors import BadInput

PROPERTIES = {"case": ("small", "capital"), "punctuation": ("none", "comma", "stop")}
"""Property → its labels. `case`: whether the word began with a capital; words without small and capital letters have no
label. `punctuation`: whether a comma or a stop followed the word."""

NO_LABEL = -1

STOPS, COMMAS = frozenset(".!?…"), frozenset(",;:")

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+|(?<=\d)[.,](?=\d)[^\W_]+)*")
"""Letters and digits; also apostrophes and hyphens between them, and the stop or comma of a number."""

SHUFFLE_SEED = 0
"""Decides the order of the texts: the same for every model."""


class Row(NamedTuple):
    """Some neighbouring words of a text."""

    words: list[str]
    """In small letters."""
    labels: dict[str, list[int]]
    """Property → the number of each word's label, or NO_LABEL."""


class Rows(NamedTuple):
    """The rows of a text file; no text has rows in both."""

    train: list[Row]
    dev: list[Row]


def label_text(text: str, words: int) -> list[Row]:
    """The rows of a text, each of `words` words; the last may be shorter. Rows of one word are left out."""
    found = list(WORD.finditer(text))
    if len(found) < 2:
        return []
    ends = [match.start() for match in found[1:]] + [len(text)]
    case = [_case(match[0]) for match in found]
    punctuation = [_punctuation(text[match.end() : end]) for match, end in zip(found, ends, strict=True)]
    small = [match[0].lower() for match in found]
    parts = [slice(start, start + words) for start in range(0, len(found) - 1, words)]
    return [Row(small[part], {"case": case[part], "punctuation": punctuation[part]}) for part in parts]


def read_rows(data: TaskDataRecipe, recipe: ProbeRecipe) -> Rows:
    """Rows of the text file `data.path`, of texts in random order.

    Raises BadInput, naming the file: not readable, or too little text, a property with one label alone, or one
    that no held-out word has.
    """
    if data.path is None:
        raise BadInput("data.path: probe needs a file of text: a .txt with a text a line, or a table with a column")
    path = Path(data.path)
    texts = _read_texts(path, data)
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(texts))
    groups: list[list[Row]] = []
    count = 0
    for number in order:
        if count >= recipe.rows:
            break
        groups.append(label_text(texts[number], recipe.words)[: recipe.rows - count])
        count += len(groups[-1])
    rows = Rows([], [])
    for group in groups:  # whole texts go to dev until it has its share
        (rows.dev if len(rows.dev) < data.held_out * count else rows.train).extend(group)
    if not rows.train or not rows.dev:
        raise BadInput(f"{path}: too little text to probe with: {len(texts)} texts; give a text a line, and more lines")
    for name, labels in PROPERTIES.items():
        if len({label for row in rows.train for label in row.labels[name]} - {NO_LABEL}) < 2:
            raise BadInput(f"{path}: its words do not differ in {name} ({' or '.join(labels)}), so there is no probe")
        if not {label for row in rows.dev for label in row.labels[name]} - {NO_LABEL}:
            raise BadInput(f"{path}: no word of the texts that are held out has a {name}; give more lines")
    return rows


def _read_texts(path: Path, data: TaskDataRecipe) -> Sequence[str]:
    if path.suffix == ".txt":
        try:
            return [line for line in decode_utf8(path.read_bytes()).split("\n") if line.strip()]
        except (OSError, ValueError) as error:
            raise BadInput(f"data.path: {path}: not readable as text ({error})") from error
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise BadInput(f"data.path: {path}: give a file whose name ends in .txt, {', '.join(SUFFIXES)}")
    columns = data.text or ["text"]
    table = read_table(path, data.header, columns, skip_bad=data.bad_rows == "skip")
    return list(_texts(table.column(columns, "data.text")[1]))


def _texts(values: Sequence[object]) -> Iterator[str]:
    return (value for value in values if isinstance(value, str))


def _case(word: str) -> int:
    return 1 if word[0].isupper() else 0 if word[0].islower() else NO_LABEL


def _punctuation(gap: str) -> int:
    """The label of a word by what stands between it and the next one; a stop wins over a comma."""
    return 2 if STOPS & set(gap) else 1 if COMMAS & set(gap) else 0
