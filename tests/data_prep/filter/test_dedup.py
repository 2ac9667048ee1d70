"""Duplicates over the whole corpus: the first in source and document order stays."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_texts import made_texts, recipe, write_jsonl
from tokenizers import Tokenizer

from data_prep.filter import dedup
from data_prep.filter.clean import CleanRecipe
from data_prep.pipeline import prepare
from data_prep.read import sources
from data_prep.read.documents import Batch
from data_prep.shards.reader import open_dataset


def changed(text: str, share: float, seed: int) -> str:
    """The text with a share of its words replaced."""
    rng, words = random.Random(seed), text.split()
    for place in rng.sample(range(len(words)), round(share * len(words))):
        words[place] = f"new{rng.random()}"
    return " ".join(words)


def jaccard(a: str, b: str) -> float:
    words = [text.lower().replace(".", " ").split() for text in (a, b)]
    one, two = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in words)
    return len(one & two) / len(one | two)


def places(parts: list[list[str]], tmp_path: Path, rule: str, ranges: int = 1, **config: Any) -> set[tuple[int, int]]:
    """(part, number) of the documents dropped under a rule."""
    folders = []
    for number, texts in enumerate(parts):
        folder = tmp_path / f"part-{number}-{ranges}"
        folder.mkdir(parents=True)
        writer = dedup.KeyWriter(folder, CleanRecipe(**config))
        for start in range(0, len(texts), 4):
            batch = texts[start : start + 4]
            writer.add(Batch(np.arange(start, start + len(batch)), batch))
        writer.flush()
        folders.append(folder)
    files = []
    for number in range(ranges):
        files.append(tmp_path / f"{rule}-{number}-of-{ranges}.npy")
        np.save(files[-1], dedup.repeated(folders, rule, number, ranges))
    return {(part, int(n)) for part in range(len(parts)) for n in dedup.dropped(files, part)}


@pytest.mark.parametrize("ranges", [1, 5])
def test_exact_copies_across_parts(tmp_path: Path, ranges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "RANGE_KEYS", 8)  # several runs a part
    texts = made_texts(30)
    parts = [[*texts[:10], texts[3]], [texts[0], *texts[10:20]], [*texts[20:], texts[12], texts[29], texts[3]]]
    found = places(parts, tmp_path, "exact", ranges, exact_duplicates=True)
    assert found == {(0, 10), (1, 0), (2, 10), (2, 11), (2, 12)}


def test_near_copies(tmp_path: Path) -> None:
    texts = made_texts(60, seed=1, words=300)
    texts = [text for text in texts if len(text.split()) > 60][:40]
    slight = [changed(text, 0.01, i) for i, text in enumerate(texts)]
    heavy = [changed(text, 0.2, i) for i, text in enumerate(texts)]
    assert np.mean([jaccard(a, b) for a, b in zip(texts, slight, strict=True)]) > 0.88
    assert np.mean([jaccard(a, b) for a, b in zip(texts, heavy, strict=True)]) < 0.35
    found = places([texts, heavy, slight], tmp_path, "near", near_duplicates=0.8)
    assert sum(part == 2 for part, _ in found) >= 0.9 * len(texts)
    assert sum(part < 2 for part, _ in found) == 0


def test_spacing_case_and_punctuation_do_not_make_a_difference(tmp_path: Path) -> None:
    text = made_texts(1, seed=3)[0]
    parts = [[text], [text.upper().replace(" ", ",  ")], ["..."], ["..."], ["one two"], ["One, two!"]]
    assert places(parts, tmp_path, "near", near_duplicates=0.9) == {(1, 0), (5, 0)}


@pytest.mark.parametrize("similarity", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_bands_find_pairs_at_the_wanted_similarity(similarity: float) -> None:
    bands, rows = dedup.bands_for(similarity)
    assert bands * rows <= 128

    def chance(s: float) -> float:
        return 1 - (1 - s**rows) ** bands

    assert chance(similarity + 0.05) > 0.75
    assert chance(similarity - 0.25) < 0.2


def test_the_whole_pipeline_drops_counts_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PART_BYTES", (20_000, 20_000))
    texts = made_texts(300, seed=2)
    near = [changed(text, 0.005, i) for i, text in enumerate(texts) if len(text.split()) > 200]
    everything = [*texts, *texts[:50], *near, "tiny"]
    corpus = write_jsonl(tmp_path / "c.jsonl", everything)
    clean = {"clean__exact_duplicates": True, "clean__near_duplicates": 0.8, "clean__min_chars": 10}
    ours = recipe(tmp_path / "d", corpus, **clean)
    for _ in range(4):
        for task in (1, 0):
            prepare(ours, task=(task, 2))
    dataset = open_dataset(prepare(ours))
    kept = sum(split["documents"] for split in dataset.manifest["splits"].values())
    assert len(texts) - 15 <= kept <= len(texts) + 15
    words = Tokenizer.from_file(str(dataset.tokenizer_path))
    first = Counter(i for e in words.encode_batch(texts, add_special_tokens=False) for i in e.ids)
    tokens = sum(split["tokens"] for split in dataset.manifest["splits"].values())
    assert abs(tokens / sum(first.values()) - 1) < 0.1
    text = (tmp_path / "d" / "report.md").read_text()
    assert f"| documents read | {len(everything)} |" in text
    assert "| same text as an earlier document | 50 (" in text
    assert "| nearly the same text as an earlier document | " in text
    assert "| shorter than min_chars | 1 (4 bytes) |" in text
    assert (tmp_path / "d" / "report.md").read_text() == text
