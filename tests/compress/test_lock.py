"""One process at a time in OUT.steps: a job that was requeued waits for the one that it replaces."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from compress_models import tiny_export

from compress.recipe import CompressRecipe, ReportRecipe
from compress.run import MARK, compress, steps_of
from data_prep.lock import LOCK, locked

RECIPE = CompressRecipe(steps=["trim"], report=ReportRecipe(latency=[]))


def waited(work: Callable[[], object], folder: Path, said: Callable[[], str]) -> None:
    """`work` says that another process works in `folder`, and ends once that one does."""
    line, heard = f"another process works in {folder}; waiting until it ends", ""
    worker = threading.Thread(target=work)
    with locked(folder):
        worker.start()
        end = time.monotonic() + 60
        while line not in heard and time.monotonic() < end:
            heard += said()
            time.sleep(0.01)
        assert line in heard
        assert worker.is_alive()
    worker.join(60)
    assert not worker.is_alive()


def test_a_second_process_waits_for_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tiny_export(tmp_path / "source"), tmp_path / "out"
    steps_of(out).mkdir()
    (steps_of(out) / MARK).touch()
    waited(lambda: compress(source, RECIPE, out), steps_of(out), lambda: capsys.readouterr().err)
    assert (out / "report.json").is_file()
    assert not steps_of(out).exists()


def test_the_lock_of_a_process_that_died_is_nobodys(tmp_path: Path) -> None:
    """Also of one that died before it had marked the folder as its own."""
    source, out = tiny_export(tmp_path / "source"), tmp_path / "out"
    steps_of(out).mkdir()
    (steps_of(out) / LOCK).touch()
    compress(source, RECIPE, out)
    assert (out / "report.json").is_file()


def test_what_came_into_the_place_of_the_result_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.trim import Trim
    from sharebert_common.errors import BadInput

    source, out = tiny_export(tmp_path / "source"), tmp_path / "out"
    apply = Trim.apply

    def slow(*given: object) -> object:
        out.mkdir()
        (out / "thesis.tex").write_text("x")
        return apply(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(Trim, "apply", slow)
    with pytest.raises(BadInput, match="exists and is no result of `compress`"):
        compress(source, RECIPE, out)
    assert (out / "thesis.tex").is_file()
    assert (steps_of(out) / "1-trim" / "model.safetensors").is_file(), "the work of the steps is kept"
