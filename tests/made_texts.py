"""Made-up text for the tests of data_prep: words of a Zipf distribution, and files of every kind."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.pipeline import PrepRecipe
from sharebert_common.recipe import load

ODD = [
    "naïve café",
    "北京大学",
    "emoji 😀👩‍👩‍👧",
    "İstanbul ſ",
    "tab\tand\u00a0space",
    "[MASK] spelt out",
    "e\u0301 combining",
    "don't—stop",
]


def made_texts(count: int, seed: int = 0, words: int = 120) -> list[str]:
    """Distinct documents of about `words` made-up words each, some with odd characters."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(2000)]
    weights = [1 / (rank + 3) for rank in range(len(vocabulary))]
    texts = []
    for number in range(count):
        chosen = rng.choices(vocabulary, weights, k=max(1, int(rng.expovariate(1 / words))))
        if rng.random() < 0.2:
            chosen.insert(rng.randrange(len(chosen) + 1), rng.choice(ODD))
        texts.append(f"{number} {' '.join(chosen)}.")
    return texts


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """One JSON object a line, as json.dumps writes it."""
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return path


def recipe(folder: Path, source: Any, **overrides: Any) -> PrepRecipe:
    """A recipe for a small dataset at `folder`; keyword a__b sets key a.b."""
    values = {
        "seq_len": 64,
        "validation": 0.1,
        "workers": 1,
        "tokenizer.train.vocab_size": 600,
        "source.paths": source,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    if "tokenizer" in values:
        del values["tokenizer.train.vocab_size"]
    return load(PrepRecipe, None, [f"output={folder}", *(f"{k}={json.dumps(_plain(v))}" for k, v in values.items())])


def tree(folder: Path) -> dict[str, str]:
    """Every file of a dataset by its checksum."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, list) else str(value) if isinstance(value, Path) else value
