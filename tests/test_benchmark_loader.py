"""`benchmarks.loader` leaves out a peer that is broken, dies or hangs, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.loader import LeftOut, LoaderProcess


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "timeout_s", "message"),
    [
        ("raise OSError('libfoo.so: cannot open')", 120, "OSError: libfoo.so: cannot open"),
        ("raise ImportError('no module of that name')", 120, "^no module of that name$"),
        ("import os; os._exit(3)", 120, "its process ended with exit code 3"),
        ("import time; time.sleep(600)", 20, "no batch in 20 s"),
    ],
)
def test_a_broken_peer_is_left_out(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, timeout_s: float, message: str
) -> None:
    (tmp_path / "litdata.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(LeftOut, match=message):
        LoaderProcess("litdata", dataset, 4, tmp_path / "out", timeout_s)
