"""Overlap with evaluation sets: the n-grams of texts that models will be judged on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from data_prep.filter.clean import EvaluationConfig
from data_prep.filter.ngrams import ngram_hashes
from data_prep.read import tables
from data_prep.read.documents import read_part
from data_prep.read.sources import Input, SourceConfig, find_inputs, plan_parts
from sharebert_common.errors import BadInput


def evaluation_ngrams(config: EvaluationConfig) -> NDArray[np.uint64]:
    """Sorted hashes of the word n-grams of all examples in the files.

    Every string of a jsonl object counts, every text column of a parquet file, and of other files every line.

    Raises BadInput: a file is missing or unreadable, or no example is long enough.
    """
    found = [np.zeros(0, np.uint64)]
    for texts in _texts(config):
        found.append(np.unique(ngram_hashes(texts, config.ngram)[0]))
    hashes = np.unique(np.concatenate(found))
    if not len(hashes):
        raise BadInput(f"clean.evaluation.ngram: no example in {config.paths} has {config.ngram} words; lower it")
    return hashes


def _texts(config: EvaluationConfig) -> Iterator[list[str]]:
    source = SourceConfig(paths=config.paths, format="text", document="line")
    try:
        inputs = find_inputs(source)
    except BadInput as error:
        raise BadInput(f"clean.evaluation.paths: {error}") from error
    for item in inputs:
        if ".parquet" in item.name:
            for column in tables.text_columns(item.location):
                for values in tables.parquet_texts(item.location, column):
                    yield [value.decode(errors="replace") for value in values if value]
            continue
        for part in plan_parts([item], source):
            for batch in read_part(part, [item], source, Counter()):
                yield _strings(item, batch.texts) if ".jsonl" in item.name else batch.texts


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
