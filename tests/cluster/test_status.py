"""Goodput, the state of a run, and the logs of its workers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster.folder import ClusterFolder, remember
from cluster.logs import newest_failure, rank_0
from cluster.status import all_runs, goodput, status, stop
from sharebert_common.errors import BadInput
from sharebert_common.run_files import write_state


def test_goodput_counts_each_step_once() -> None:
    lines = [{"step": 10, "step_s": 2.0}, {"step": 20, "step_s": 3.0}]
    assert goodput(lines, began=100.0, ended=200.0) == pytest.approx(0.5)
    assert goodput([], began=0.0, ended=1.0) is None


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    folder = ClusterFolder(tmp_path / "run")
    with folder.prepared("steps: 1\n"):
        pass
    folder.add_submission(job="999999", launcher="local", nodes=1, folder=str(folder.jobs / "999999"))
    return folder


def test_a_run_whose_job_is_gone_is_not_called_running(folder: ClusterFolder) -> None:
    (folder.run / "state.json").write_text(json.dumps({"state": "running", "step": 0, "steps": 100, "updated": 9e9}))
    (folder.run / "log.jsonl").write_text(
        json.dumps({"step": 50, "loss": 3.0, "step_s": 0.5, "tokens_per_s": 1000.0}) + '\n{"step": 60, "lo'
    )
    found = status(folder.run)
    assert (found.state, found.step, found.steps, found.loss) == ("failed", 50, 100, 3.0)


def test_a_run_without_state_and_one_that_was_emptied_hide_no_other(
    folder: ClusterFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status(folder.run).state == "failed"
    assert status(folder.run).goodput is None
    (folder.run / "log.jsonl").write_text('{"step": 50, "loss": 3.0, "step_s": 0.5, "tokens_per_s": 1000.0}\n')
    assert "step      50 of ?" in status(folder.run).text()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    emptied = tmp_path / "emptied"
    emptied.mkdir()
    for run in (emptied, folder.run):
        remember(run)
    lines = all_runs().splitlines()
    assert len(lines) == 2
    assert any(line.startswith("failed") and str(folder.run) in line for line in lines)
    assert any(line.startswith("unknown") and str(emptied) in line for line in lines)


def test_a_run_that_was_stopped_before_it_began_is_stopped(folder: ClusterFolder) -> None:
    folder.stop_before_begin("1.0")
    found = status(folder.run)
    assert (found.state, found.reason) == ("stopped", "asked before the attempt began")
    write_state(folder.run, "finished", step=9)
    folder.stop_before_begin("1.0")
    assert folder.state["state"] == "finished"


def test_what_was_never_submitted_is_refused(tmp_path: Path) -> None:
    for act in (status, stop, newest_failure, lambda run: list(rank_0(run, follow=False))):
        with pytest.raises(BadInput, match="was not"):
            act(tmp_path)


def test_stop_of_a_job_that_is_over_is_refused(folder: ClusterFolder) -> None:
    with pytest.raises(BadInput, match="job 999999 is over"):
        stop(folder.run)


def test_the_first_rank_that_failed_is_shown(folder: ClusterFolder) -> None:
    folder.begin("1.0", job="1")

    for order, (node, local) in enumerate([("n2", 1), ("n1", 0)]):
        file = folder.workers / "1.0" / node / "1.0_abc" / "attempt_2" / str(local) / "stderr.log"
        file.parent.mkdir(parents=True)
        file.write_text(f"a warning\nTraceback (most recent call last):\n  of {node}\n")
        os.utime(file, (1000 + order, 1000 + order))
    assert newest_failure(folder.run) == (
        "attempt 1.0, node n2, local rank 1, restart in place 2:\nTraceback (most recent call last):\n  of n2"
    )


def test_logs_show_rank_0_and_the_agents(folder: ClusterFolder) -> None:
    file = folder.jobs / "999999" / "999999_0_log.out"
    file.parent.mkdir(parents=True)
    file.write_text("agent\n[rank 0] step 1\n[rank 4] step 1\nhalf a li")
    assert list(rank_0(folder.run, follow=False)) == ["agent", "[rank 0] step 1"]
