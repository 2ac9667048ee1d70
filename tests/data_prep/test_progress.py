"""A log file gets a line a minute, also while a part takes longer; a terminal gets a bar."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_texts import made_texts, write_jsonl

from data_prep import progress
from data_prep.progress import StageProgress


def test_lines_come_on_time_and_say_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.1)
    with StageProgress("encode", 4) as stage:
        time.sleep(0.25)  # a part that takes longer than that
        stage.advance(5_000_000, 2_000_000)
        time.sleep(0.15)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "prep: encode: 0/4 parts"
    pattern = r"prep: encode: 1/4 parts · \d+\.\d MB/s · \d+\.\d M tokens/s · 0:00:0[1-9] left"
    assert any(re.fullmatch(pattern, line) for line in lines)
    assert re.fullmatch(r"prep: encode: 1/4 parts · .* · done", lines[-1])
    assert len(lines) >= 4


def test_a_terminal_shows_a_bar_and_the_report(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", made_texts(200))
    pty = pytest.importorskip("pty")
    command = [sys.executable, "-m", "sharebert_cli", "prep", "corpus", f"output={tmp_path / 'd'}", "workers=1"]
    command += [f"source.paths={corpus}", "tokenizer.train.vocab_size=600"]
    reader, terminal = pty.openpty()
    with subprocess.Popen(command, stderr=terminal, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        shown = b""
        printed = process.stdout.read()
        while b"report.html" not in shown:
            shown += (piece := os.read(reader, 1 << 16))
            assert piece
    text = shown.decode()
    assert printed.strip() == str(tmp_path / "d")
    assert "encode" in text
    assert "━" in text
    assert "MB/s" in text
    assert re.search(r"documents read +200\b", text)
    assert re.search(r"fill of the rows +\d+\.\d\d %", text)
