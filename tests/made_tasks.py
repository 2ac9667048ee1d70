"""Made-up labelled rows for the tests of scoring, made of the words of `tiny_models.tiny_tokenizer`."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tiny_models import tiny_model, tiny_tokenizer

from exports.export import Export
from exports.forms import write_export


def rows(count: int, seed: int) -> list[tuple[str, int]]:
    """Texts of 3 to 9 words with labels: 1 if most come from w0 … w9, 0 if most come from w10 … w19."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label = draw.randint(0, 1)
        words = [f"w{draw.randint(0, 9) + (10 if draw.random() < 0.1 else 0) + 10 * (1 - label)}" for _ in range(3)]
        made.append((" ".join([*words, *(f"w{draw.randint(30, 99)}" for _ in range(draw.randint(0, 6)))]), label))
    return made


def write_tsv(path: Path, header: Sequence[str], values: Sequence[Sequence[object]]) -> Path:
    """Write a tsv file as GLUE's are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [header, *values] if row), encoding="utf-8")
    return path


def sst2(folder: Path, train: int = 320, dev: int = 80) -> Path:
    """A folder with the train and dev files of SST-2."""
    for split, count, seed in (("train", train, 0), ("dev", dev, 1)):
        write_tsv(folder / f"{split}.tsv", ("sentence", "label"), rows(count, seed))
    return folder


def tiny_export(out: Path, **changes: object) -> Path:
    """An export of `tiny_model`, with its tokenizer."""
    out.parent.mkdir(parents=True, exist_ok=True)
    model = tiny_model(init="variance", **changes)
    write_export(Export.of_model(model, tokenizer=tiny_tokenizer(out.parent)), out)
    return out


def blimp(folder: Path, pairs: int = 6) -> Path:
    """A folder with three files of BLiMP: sentences of 3 to 8 words, where the unacceptable one has another word."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for uid, field, term in (("x_1", "syntax", "x"), ("x_2", "syntax", "x"), ("y_1", "semantics", "y")):
        lines = []
        for _ in range(pairs):
            words = [f"w{draw.randint(0, 99)}" for _ in range(draw.randint(3, 8))]
            other = [*words]
            other[draw.randrange(len(words))] = f"w{draw.randint(100, 199)}"
            texts = {"sentence_good": " ".join(words), "sentence_bad": " ".join(other)}
            lines.append(json.dumps({**texts, "field": field, "linguistics_term": term, "UID": uid}) + "\n")
        (folder / f"{uid}.jsonl").write_text("".join(lines))
    return folder
