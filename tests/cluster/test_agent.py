"""Agents and prep tasks without torchrun: what ends a job for good, and what is only an interrupted attempt."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.agent import Agent
from cluster.allocation import Allocation
from cluster.folder import ClusterFolder
from cluster.launch import Training, after_setup
from cluster.prep import PrepTask
from cluster.recipe import ClusterRecipe
from sharebert_common.errors import BadInput
from sharebert_common.processes import STOP_SIGNALS

SIGNAL_TO_THE_AGENT = "kill -USR2 $PPID; sleep 0.2"


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """The handlers that an agent leaves behind are taken back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    folder = ClusterFolder(tmp_path / "run")
    with folder.prepared("steps: 1\n"):
        pass
    return folder


def allocated(folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch, node: int = 0) -> Path:
    """Let agents and tasks run as this node of the job 7. Returns the file that permits a requeue."""
    job = folder.jobs / "7"
    job.mkdir(parents=True, exist_ok=True)
    for module in ("agent", "prep"):
        monkeypatch.setattr(
            f"cluster.{module}.current_allocation",
            lambda port: Allocation("7", 0, node, ("localhost", "other"), job, 20_000),
        )
    return job / "requeue"


def agent(folder: ClusterFolder, *setup: str) -> Agent:
    return Agent(Training(folder.run, ("none",), (), ClusterRecipe(setup=list(setup), preflight=False)))


def test_a_signal_does_not_end_the_lines_of_setup() -> None:
    """SLURM sends it to every process of the step."""
    lines = ["for name in TERM USR1 USR2; do kill -$name $$; done", "bash -c 'kill -TERM $$'", "export MODE=alive"]
    assert after_setup(lines, {"PATH": "/usr/bin:/bin"})["MODE"] == "alive"


def test_a_setup_that_fails_ends_the_job(
    folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    permit = allocated(folder, monkeypatch)
    for call in (agent(folder, "exit 3"), PrepTask((), ClusterRecipe(setup=["exit 3"]))):
        with pytest.raises(BadInput, match="setup: exit code 3"):
            call()
        assert not permit.exists()
        assert "error: setup: exit code 3" in capsys.readouterr().err
    assert folder.state["state"] == "failed"


def test_a_setup_that_fails_after_a_signal_was_interrupted(
    folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it copies from, for instance, ended because of the same signal: the job may be requeued."""
    permit = allocated(folder, monkeypatch)
    for call in (
        agent(folder, SIGNAL_TO_THE_AGENT, "exit 3"),
        PrepTask((), ClusterRecipe(setup=[SIGNAL_TO_THE_AGENT, "exit 3"])),
    ):
        assert call() == "stopped"
        assert permit.exists()
        permit.unlink()
    assert folder.state["state"] == ""


def test_the_first_node_alone_decides_whether_an_attempt_begins(
    folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop that is asked for between the looks of two nodes ends both in the same way."""
    permit = allocated(folder, monkeypatch)
    permit.touch()
    folder.ask_for_stop()
    assert agent(folder)() == "stopped"
    assert not permit.exists()
    assert folder.state["state"] == "stopped"
    allocated(folder, monkeypatch, node=1)
    assert agent(folder)() == "stopped", "it learns what the first node decided"

    folder.begin("7.0")
    setup = "touch began; exit 3"
    monkeypatch.chdir(folder.run)
    with pytest.raises(BadInput, match="setup: exit code 3"):
        agent(folder, setup)()
    assert (folder.run / "began").exists(), "the first node began before the request"


def test_a_node_that_sees_no_decision_of_the_first_says_so(
    folder: ClusterFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated(folder, monkeypatch, node=1)
    monkeypatch.setattr("cluster.agent.SHARED_S", 0.3)
    folder.ask_for_stop()
    folder.stop_before_begin("6.0")
    with pytest.raises(BadInput, match="other does not see what localhost wrote there"):
        agent(folder)()
