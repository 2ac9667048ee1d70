"""The demo's labelled task, and the tables that the demo prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.demo import forms, scores
from benchmarks.plays_task import GENRES, HELD_OUT, PASSAGE_WORDS, PASSAGES, passages, speeches, write_task

PLAY = """THE PLAY

by Someone

ACT I. A room.

[Enter DUKE, and
others.]

DUKE.
If music be the food of love,
play on. [Aside.] It came o'er my ear.

Cor. and Volt.
In that will we show our duty.

THESEUS
I must confess.

[Exeunt.]
"""


def test_speeches_are_without_names_and_directions() -> None:
    assert list(speeches(PLAY)) == [
        "If music be the food of love, play on. It came o'er my ear.",
        "In that will we show our duty.",
        "I must confess.",
    ]


def test_passages_are_spread_over_a_play() -> None:
    words = [f"w{number}" for number in range(PASSAGE_WORDS * PASSAGES * 3 + 5)]
    found = passages("DUKE.\n" + " ".join(words))
    assert len(found) == PASSAGES
    assert found[0].split() == words[:PASSAGE_WORDS]
    assert found[1].split()[0] == words[3 * PASSAGE_WORDS]  # every third passage
    assert len(passages("DUKE.\n" + " ".join(words[: 2 * PASSAGE_WORDS + 1]))) == 2


def test_no_play_is_in_both_splits(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for plays in GENRES.values():
        for play in plays:
            (texts / f"{play}_gut.txt").write_text("DUKE.\n" + f"{play} " * PASSAGE_WORDS * 2)
    sizes = write_task(texts, tmp_path / "task")
    rows = {
        split: [json.loads(line) for line in (tmp_path / "task" / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "dev")
    }
    plays_of = {split: {row["play"] for row in rows[split]} for split in rows}
    assert plays_of["dev"] == set(HELD_OUT)
    assert not plays_of["dev"] & plays_of["train"]
    assert sizes == {split: len(rows[split]) for split in rows} == {"train": 2 * 28, "dev": 2 * 8}
    for split in rows.values():
        assert {row["label"] for row in split} == set(GENRES)
        assert all(set(row["text"].split()) == {row["play"]} for row in split)


def test_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(number: int, runtime: str) -> dict[str, object]:
        return {"bytes": number * 1000, "loss": number / 8, "latency_ms": {runtime: {"1x32": number / 2}}}

    order = [row(9, "pytorch"), row(8, "pytorch"), row(2, "pytorch"), row(40, "transformers"), row(12, "onnxruntime")]
    (tmp_path / "report.json").write_text(json.dumps({"rows": order}))
    forms(Path(tmp_path))
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[-5:] for line in lines[1:]] == [
        ["9,000", "1.1250", "4.50", "in", "pytorch"],
        ["40,000", "5.0000", "20.00", "in", "transformers"],
        ["12,000", "1.5000", "6.00", "in", "onnxruntime"],
        ["2,000", "0.2500", "1.00", "in", "pytorch"],
    ]
    for model, accuracy in ("export", 0.5), ("majority", 0.25):
        result = {"model": model, "scores": {"dev": {"accuracy": [accuracy]}}}
        (tmp_path / f"{model}.json").write_text(json.dumps(result))
    (tmp_path / "report.json").unlink()
    scores(tmp_path)
    assert [line.split() for line in capsys.readouterr().out.strip().splitlines()[1:]] == [
        ["majority", "0.250"],
        ["export", "0.500"],
    ]
