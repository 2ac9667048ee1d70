"""Each rule leaves out what it should and counts it; nothing is left out by default."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_texts import made_texts

from data_prep.filter import ngrams
from data_prep.filter.clean import Cleaner, CleanRecipe, normalise, repetition_shares, symbol_shares
from data_prep.filter.decontaminate import DecontaminateRecipe, evaluation_ngrams
from data_prep.filter.ngrams import ngram_hashes
from data_prep.pipeline import PrepRecipe
from data_prep.read.documents import Batch
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

TEXTS = made_texts(50, seed=4)


def clean(texts: list[str], **config: Any) -> tuple[list[str], Counter[str]]:
    counts: Counter[str] = Counter()
    settings_ = CleanRecipe(**config)
    grams = evaluation_ngrams(settings_.evaluation) if settings_.evaluation.paths else None
    batch = normalise(Batch(np.arange(len(texts)) + 7, texts), settings_)
    out = Cleaner(settings_, grams)(batch, counts)
    assert [texts.index(t) + 7 for t in out.texts if t in texts] == out.numbers.tolist() or settings_.unicode != "none"
    return out.texts, counts


def test_nothing_is_left_out_by_default() -> None:
    texts = [*TEXTS, "x", "!!!", "a " * 1000]
    kept, counts = clean(texts)
    assert kept == texts
    assert not [key for key in counts if key.startswith("dropped")]


def test_lengths() -> None:
    kept, counts = clean(["a" * 3, "é" * 4, "b" * 6, "c" * 7], min_chars=4, max_chars=6)
    assert kept == ["é" * 4, "b" * 6]
    assert counts["dropped.short"] == counts["dropped.long"] == 1
    assert (counts["dropped_bytes.short"], counts["dropped_bytes.long"]) == (3, 7)


def test_symbols() -> None:
    texts = ["plain words, a stop.", "### $$$ %%% ==>", "naïve Äpfel 北京", "→→→ ★★ x", "हिन्दी"]
    expected = [sum(not (c.isalnum() or c.isspace()) for c in t) / len(t) for t in texts[:4]]
    np.testing.assert_allclose(symbol_shares(texts), [*expected, 0])  # vowel signs are no symbols
    kept, counts = clean(texts, max_symbols=0.3)
    assert kept == [texts[0], texts[2], texts[4]]
    assert counts["dropped.symbols"] == 2


def test_repetition() -> None:
    texts = [TEXTS[0], "buy this now and save " * 40, " ".join(f"word{i}" for i in range(200)), "short"]
    shares = repetition_shares(texts)
    assert shares[1] == pytest.approx(191 / 196)  # 5 different 5-grams of 196
    assert shares[2] == shares[3] == 0
    kept, counts = clean(texts, max_repetition=0.5)
    assert texts[1] not in kept
    assert counts["dropped.repetition"] == 1


def test_unicode() -> None:
    texts = ["e\u0301 ﬁ"]
    assert clean(texts)[0] == texts
    assert clean(texts, unicode="nfc")[0] == ["é ﬁ"]
    assert clean(texts, unicode="nfkc")[0] == ["é fi"]


def test_languages() -> None:
    english = "The quick brown fox jumps over the lazy dog and then goes home to sleep for a while."
    german = "Der schnelle braune Fuchs springt über den faulen Hund und geht dann nach Hause, um zu schlafen."
    french = "Le renard brun rapide saute par-dessus le chien paresseux et rentre ensuite chez lui pour dormir."
    kept, counts = clean([english, german, french, "0 0 0"], languages=["en", "fr"])
    assert kept == [english, french]
    assert counts["dropped.language"] == 2
    assert counts["language.de"] == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "[no]",
            r"""YAML reads no as true or false; quote it: \['no'\] in a recipe, 'clean\.languages=\["no"\]'""",
        ),
        ("[en,no]", r"YAML reads no as true or false"),
        ("[en,1]", r"YAML reads 1 as a number; quote it: \['1'\]"),
        ("[null]", r"YAML reads null as null; quote it: \['null'\]"),
    ],
)
def test_norwegian_is_not_false(value: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load(PrepRecipe, None, ["output=x", "source=y", f"clean.languages={value}"])
    recipe = load(PrepRecipe, None, ["output=x", "source=y", "clean.languages=['no', en]"])
    assert recipe.clean.languages == ["no", "en"]


EXAMPLE = "the heir of the house came back to the old town after many long and lonely years abroad"


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_evaluation_sets(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"dev.{kind}"
    if kind == "tsv":
        path.write_text(f"sentence\tlabel\n{EXAMPLE}\t1\ntoo short\t0\n")
    elif kind == "jsonl":
        path.write_text(json.dumps({"pair": ["too short", {"deep": EXAMPLE}], "label": 1}))
    else:
        pq.write_table(pa.table({"n": [1], "body": [EXAMPLE]}), path)
    words = EXAMPLE.split()
    texts = [
        TEXTS[0],
        f"And so THE HEIR, of the house -- {' '.join(words[5:14]).title()}! And then",  # 13 words that meet
        "Begin. " + " ".join(words[1:13]),  # 12
        " ".join(words[2:15]) + " " + TEXTS[1],
    ]
    for action, kept in (("report", texts), ("remove", [texts[0], texts[2]])):
        got, counts = clean(texts, evaluation=DecontaminateRecipe(paths=[str(path)], action=action))
        assert got == kept
        assert counts["overlap"] == 2
        assert counts["dropped.evaluation"] == 2 * (action == "remove")


def test_bad_evaluation_sets(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("only four words here")
    (tmp_path / "bad.jsonl").write_text("{")
    messages = {"short.txt": "no example in .* has 13 words", "none": "no such file", "bad.jsonl": "not JSON"}
    for name, message in messages.items():
        with pytest.raises(BadInput, match=message):
            evaluation_ngrams(DecontaminateRecipe(paths=[str(tmp_path / name)]))


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="ab ,.\n\u00e9Ω北", max_size=60), min_size=1, max_size=5),
    n=st.integers(1, 4),
    whole=st.booleans(),
)
def test_ngrams_are_those_of_a_naive_reading(texts: list[str], n: int, whole: bool) -> None:
    hashes, offsets = ngram_hashes(texts, n, whole)
    seen: dict[tuple[str, ...], int] = {}
    for text, start, stop in zip(texts, offsets, offsets[1:], strict=False):
        words = re.findall("[abéω]+|北", text.lower())
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if whole and words and not grams:
            grams = [tuple(words)]
        assert stop - start == len(grams)
        for gram, value in zip(grams, hashes[start:stop].tolist(), strict=True):
            assert seen.setdefault(gram, value) == value
    assert len(set(seen.values())) == len(seen)


def test_ngrams_do_not_depend_on_the_size_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ngram_hashes(TEXTS, 5)
    monkeypatch.setattr(ngrams, "_CHUNK_BYTES", 300)
    for ours, theirs in zip(ngram_hashes(TEXTS, 5), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
