"""Results on disk: one file a model, whatever the models are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from scoring.report import Result, read_results, table, write_result
from sharebert_common.errors import BadInput


def result(model: str, accuracy: float = 0.5) -> Result:
    return Result(
        task="sst2", model=model, scores={"dev": {"accuracy": [accuracy]}}, parameters=1, bytes=4, latency_ms=1.0,
        device="cpu", threads=1, train_rows=2, fit_s=[1.0],
    )  # fmt: skip


def test_models_with_like_names_keep_their_results(tmp_path: Path) -> None:
    names = ["a/b", "a-b", "/a/b", "a b", "a?b", "./a=b", "[a]b", "%a~b", "é/" + "long/" * 60, "x/" + "long/" * 60]
    for turn in range(2):
        for number, name in enumerate(names):
            write_result(tmp_path, result(name, (number + turn) / 20))
        assert sorted(found.model for found in read_results(tmp_path)) == sorted(names)
    assert (tmp_path / "a-b.json").exists()
    assert len(list(tmp_path.glob("*.json"))) == len(names)
    assert {found.model: found.scores["dev"]["accuracy"][0] for found in read_results(tmp_path)} == {
        name: (number + 1) / 20 for number, name in enumerate(names)
    }


def test_a_bar_in_a_name_does_not_break_the_table() -> None:
    *_, row = table([result("a|b")]).splitlines()
    assert row.startswith("| a\\|b ")


def test_a_file_that_is_not_a_result(tmp_path: Path) -> None:
    (tmp_path / "a-b.json").write_text("[]")
    with pytest.raises(BadInput, match=r"a-b\.json: not a result of evaluate"):
        write_result(tmp_path, result("a/b"))
