"""The report adds up, and its page is one file that needs no other."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from made_texts import made_texts, recipe, write_jsonl

from data_prep.pipeline import prepare
from data_prep.shards.format import SPLITS
from data_prep.shards.reader import open_dataset


def table(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", text, re.MULTILINE))


def test_report_of_a_dataset(tmp_path: Path) -> None:
    texts = [*made_texts(200, seed=6), "☃ <b>&", "!!! ???"]
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    with corpus.open("ab") as file:
        file.write(b'not json\n{"text": "\xff"}\n')
    folder = prepare(
        recipe(tmp_path / "d", corpus, source__bad_documents="skip", clean__max_symbols=0.4, clean__max_repetition=0.9)
    )
    dataset, rows = open_dataset(folder), table((folder / "report.md").read_text())
    splits = dataset.manifest["splits"]
    assert rows["documents read"] == "203"
    assert rows["bytes of text read"] == f"{sum(len(t.encode()) for t in texts) + 3:,}"
    assert rows["not readable"] == "1"
    assert rows["documents with invalid bytes, repaired"] == "1"
    assert rows["too many symbols"].startswith("3 (")
    assert rows["documents kept"].startswith("200 (98.52 %)")
    for name in SPLITS:
        split = dataset.split(name)
        assert rows[f"{name}: rows of 64"] == f"{split.rows:,}"
        assert rows[f"{name}: tokens"] == f"{splits[name]['tokens']:,}"
        assert rows[f"{name}: documents"] == f"{splits[name]['documents']:,}"
    padding = sum((dataset.split(n).read(np.arange(dataset.split(n).rows))[1] == 0).sum() for n in SPLITS)
    cells = sum(dataset.split(n).rows for n in SPLITS) * 64
    assert rows["fill of the rows"] == f"{100 * (1 - padding / cells):.2f} %"
    assert float(rows["unknown tokens"].split()[0]) < 1

    page = (folder / "report.html").read_text()
    for value in rows.values():
        assert value in page
    found: list[str] = []

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append(tag)
            assert not {"src", "href"} & {name for name, _ in attrs}

    Check().feed(page)
    assert "script" not in found
    assert found.count("h2") >= 6  # tables, and histograms of characters, tokens, symbols, repetition
