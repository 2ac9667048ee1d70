"""state.json and log.jsonl: defaults, half lines, and files that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sharebert_common import run_files
from sharebert_common.errors import BadInput


def test_a_run_that_was_never_started_has_a_whole_state(tmp_path: Path) -> None:
    state = run_files.read_state(tmp_path)
    assert state["state"] == ""
    assert (state["step"], state["steps"], state["updated"], state["crashes"]) == (0, 0, 0.0, {})
    run_files.read_state(tmp_path)["crashes"]["3"] = 1
    assert run_files.read_state(tmp_path)["crashes"] == {}, "the defaults are not shared"


def test_keys_that_are_not_given_keep_their_values(tmp_path: Path) -> None:
    run_files.write_state(tmp_path, "running", step=5, steps=9, crashes={"3": 1})
    run_files.write_state(tmp_path, "stopped", reason="signal SIGTERM")
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["state"], state["reason"], state["step"], state["steps"]) == ("stopped", "signal SIGTERM", 5, 9)
    assert state["crashes"] == {"3": 1}
    assert state["updated"] > 0


@pytest.mark.parametrize("text", ["", "{", "3", "[1]"])
def test_a_state_that_is_not_json_is_refused_and_those_who_watch_see_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(BadInput, match=r"state\.json: not JSON"):
        run_files.read_state(tmp_path)
    assert run_files.peek_state(tmp_path)["state"] == ""


def test_a_half_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    assert run_files.read_log(tmp_path) == []
    assert run_files.last_logged_step(tmp_path) == 0
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1}\n{"step": 2, "name": "a\u2028b"}\n{"step": 3, "lo', encoding="utf-8"
    )
    assert [line["step"] for line in run_files.read_log(tmp_path)] == [1, 2]
    assert run_files.last_logged_step(tmp_path) == 2


def test_a_written_line_is_read(tmp_path: Path) -> None:
    log = run_files.LogWriter(tmp_path / run_files.LOG_FILE)
    log.waiting += [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    log.write()
    log.close()
    assert [line["loss"] for line in run_files.read_log(tmp_path)] == [2.0, 1.0]
    assert log.waiting == []


@pytest.mark.parametrize("before", [None, "", '{"step": 1}\n', '{"step": 1}\n{"st', "{"])
def test_half_a_line_at_the_end_hides_no_later_line(tmp_path: Path, before: str | None) -> None:
    """A crash or a full disk has left it."""
    file = tmp_path / "events.jsonl"
    if before is not None:
        file.write_text(before)
    for step in (2, 3):
        run_files.append_json_line(file, {"step": step, "text": "größer"})
    whole = [1] if before and "1}" in before else []
    assert [line["step"] for line in run_files.read_json_lines(file)] == [*whole, 2, 3]
    assert "" not in file.read_text().rstrip("\n").split("\n")
