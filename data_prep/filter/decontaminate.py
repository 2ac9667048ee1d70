"""Find documents that overlap with evaluation sets: they share word n-grams with the texts that judge a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from data_prep.filter.ngrams import ngram_hashes
from data_prep.read import tables
from data_prep.read.documents import Batch, read_part
from data_prep.read.sources import Input, Part, SourceRecipe, find_inputs, kind_of, plan_parts
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT


@dataclass(config=STRICT, kw_only=True)
class DecontaminateRecipe:
    """The evaluation sets, and what to do with documents that overlap with them."""

    paths: list[str] = field(default_factory=list)
    """Evaluation files, folders, globs or URLs: all text of jsonl and parquet files counts, and each line of others."""
    ngram: int = Field(default=13, ge=1)
    """Words in a row that a document and an example must share to overlap; shorter examples are not looked for."""
    action: Literal["report", "remove"] = "report"
    """What happens to documents that overlap: report counts them, remove leaves them out too."""


def evaluation_ngrams(config: DecontaminateRecipe) -> NDArray[np.uint64]:
    """Sorted hashes of the word n-grams of all examples in the evaluation files.

    Every string of a jsonl object counts, every text column of a parquet file, and every line of other files.

    Raises BadInput: a file is missing or unreadable, or no example is long enough.
    """
    found = [np.zeros(0, np.uint64)]
    for texts in _texts(config):
        found.append(np.unique(ngram_hashes(texts, config.ngram)[0]))
    hashes = np.unique(np.concatenate(found))
    if not len(hashes):
        raise BadInput(f"clean.evaluation.ngram: no example in {config.paths} has {config.ngram} words; lower it")
    return hashes


def overlaps(texts: Sequence[str], wanted: NDArray[np.uint64], n: int) -> NDArray[np.bool_]:
    """Whether each text has one of the n-grams whose sorted hashes are `wanted`."""
    hashes, offsets = ngram_hashes(texts, n)
    at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
    hits = np.concatenate([[0], np.cumsum(wanted[at] == hashes)]) if len(wanted) else np.zeros(len(hashes) + 1)
    return hits[offsets[1:]] > hits[offsets[:-1]]


def _texts(config: DecontaminateRecipe) -> Iterator[list[str]]:
    source = SourceRecipe(paths=config.paths, format="text", document="line")
    try:
        inputs = find_inputs(source)
    except BadInput as error:
        raise BadInput(f"clean.evaluation.paths: {error}") from error
    for item in inputs:
        if kind_of(item.name) == "parquet":
            for column in tables.text_columns(item.location):
                for _, values in tables.parquet_texts(item.location, column):
                    yield [value.decode(errors="replace") for value in values if value]
            continue
        for part in plan_parts([item], source):
            for batch in _batches(part, item, source):
                yield _strings(item, batch.texts) if kind_of(item.name) == "jsonl" else batch.texts


def _batches(part: Part, item: Input, source: SourceRecipe) -> Iterator[Batch]:
    """Raises BadInput that names the key of this filter: `source.encoding` has no effect on its files."""
    try:
        yield from read_part(part, [item], source, Counter())
    except BadInput as error:
        reason = str(error).partition("; convert it to UTF-8")[0]
        remedy = "; convert it to UTF-8" if reason != str(error) else ""
        raise BadInput(f"clean.evaluation.paths: {reason}{remedy}") from error


def _strings(item: Input, lines: list[str]) -> list[str]:
    found: list[str] = []
    waiting: list[Any] = []
    try:
        waiting = [orjson.loads(line) for line in lines]
    except ValueError as error:
        raise BadInput(f"clean.evaluation.paths: {item.name}: a line is not JSON ({error})") from error
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
    return found
