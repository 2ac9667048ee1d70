"""`benchmarks.data_prep` leaves out a peer that is broken, and says so; without our own pipeline it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import data_prep


def test_a_broken_peer_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "a"}\n')
    (tmp_path / "litdata.py").write_text("raise OSError('libfoo.so: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    pipelines = {name: data_prep.PIPELINES[name] for name in ("sharebert prep", "litdata")}
    pipelines["absent"] = (data_prep.litdata, "no_such_package")
    monkeypatch.setattr(data_prep, "PIPELINES", pipelines)
    real = data_prep.measure

    def measure(name: str, corpus: Path, tokenizer: Path) -> dict[str, float]:
        return {"seconds": 1.0, "core_seconds": 2.0} if name == "sharebert prep" else real(name, corpus, tokenizer)

    monkeypatch.setattr(data_prep, "measure", measure)
    data_prep.print_pipelines(2, corpus, corpus, tmp_path / "tokenizer.json")
    said = capsys.readouterr().out
    assert said.startswith("absent: left out (not installed)\n")
    assert said.count("litdata: left out (OSError: libfoo.so: cannot open)\n") == 1
    assert "\nsharebert prep " in said
    assert "\nlitdata  " not in said

    monkeypatch.setattr(data_prep, "measure", real)
    with pytest.raises(SystemExit, match="sharebert prep failed"):
        data_prep.print_pipelines(1, corpus, corpus, tmp_path / "no-tokenizer.json")
