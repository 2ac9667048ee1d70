"""Where SLURM knows a job, has forgotten it, or does not answer. Its commands are scripts here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic.dataclasses import dataclass as config

from cluster import scheduler
from cluster.folder import ClusterFolder
from cluster.recipe import ClusterRecipe
from cluster.status import status, stop
from cluster.submit import submit
from sharebert_common.errors import BadInput
from sharebert_common.run_files import write_state

DOWN = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
TASK_FORGOTTEN = "echo 'Job 7_0 not found'; exit 1"
NO_ACCOUNTING = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
RUNNING = "echo 'JobId=7 JobState=RUNNING NodeList=n[1-2] Reason=None'"

Commands = Callable[..., None]


@config
class Data:
    """The part `data` of a train recipe."""

    dataset: list[Any] = field(default_factory=list)


@config
class TrainRecipe:
    """What a submission looks at in a train recipe."""

    run: str
    lr: float = 9.0
    data: Data = field(default_factory=Data)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """A function that sets what SLURM's commands do; all but those named fail as where the controller is down."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def are(**scripts: str) -> None:
        for name in ("scontrol", "sacct", "sbatch", "srun", "scancel"):
            (folder / name).write_text(f"#!/bin/sh\n{scripts.get(name, DOWN)}\n")
            (folder / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    are()
    return are


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    """A run that trains as job 7."""
    folder = ClusterFolder(tmp_path / "run")
    with folder.prepared("lr: 1.0\n"):
        folder.add_submission(job="7", launcher="slurm", nodes=2, folder=str(folder.jobs / "7"))
    write_state(folder.run, "running", step=5)
    return folder


@pytest.mark.parametrize(
    ("scontrol", "sacct", "state"),
    [
        (RUNNING, DOWN, "RUNNING"),
        (FORGOTTEN, "echo 'COMPLETED|n[1-2]'", "COMPLETED"),
        (FORGOTTEN, "echo 'CANCELLED by 0|n[1-2]'", "CANCELLED"),
        (FORGOTTEN, "true", "GONE"),
        (FORGOTTEN, NO_ACCOUNTING, "GONE"),
        (TASK_FORGOTTEN, NO_ACCOUNTING, "GONE"),
        (DOWN, "echo 'RUNNING|n[1-2]'", "RUNNING"),
        (DOWN, "true", "UNKNOWN"),
        (DOWN, NO_ACCOUNTING, "UNKNOWN"),
        ("exit 1", DOWN, "UNKNOWN"),
    ],
)
def test_a_job_is_gone_only_where_the_controller_says_so(
    commands: Commands, scontrol: str, sacct: str, state: str
) -> None:
    commands(scontrol=scontrol, sacct=sacct)
    assert scheduler.state_of("7", "slurm") == state
    assert scheduler.is_over("7", "slurm") == (state not in ("RUNNING", "UNKNOWN"))


def test_without_slurms_commands_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert scheduler.state_of("7", "slurm") == "UNKNOWN"


def test_a_controller_that_is_down_does_not_make_a_run_fail(commands: Commands, folder: ClusterFolder) -> None:
    said = status(folder.run)
    assert (said.state, said.reason, said.job) == ("unknown", "SLURM does not answer", "7 (unknown)")
    assert stop(folder.run).endswith("SLURM does not answer; job 7, where it is not over, will save and end")
    assert folder.stop_asked
    write_state(folder.run, "finished", step=9)
    assert status(folder.run).state == "finished"


def test_a_controller_that_is_down_is_no_leave_to_submit_again(commands: Commands, folder: ClusterFolder) -> None:
    folder.ask_for_stop()
    with pytest.raises(BadInput, match="SLURM does not answer, and job 7 of this run may be alive"):
        submit([TrainRecipe(str(folder.run))], ClusterRecipe())
    assert folder.recipe.read_text() == "lr: 1.0\n"
    assert folder.stop_asked


@dataclass
class Refusal:
    """An sbatch that copies what a job that starts at once would find, and ends with `code`."""

    folder: ClusterFolder
    code: int

    @property
    def script(self) -> str:
        path = self.folder.path
        return f"cp {path}/train.yaml {path}/seen; ls {path} >> {path}/seen; echo 'job 8'; exit {self.code}"


def test_a_job_that_starts_at_once_finds_its_own_recipe(commands: Commands, folder: ClusterFolder) -> None:
    folder.ask_for_stop()
    commands(scontrol=FORGOTTEN, sacct="true", srun="true", sbatch=Refusal(folder, 0).script)
    assert submit([TrainRecipe(str(folder.run))], ClusterRecipe()) == [(folder.run, "8")]
    seen = (folder.path / "seen").read_text().splitlines()
    assert "lr: 9.0" in seen
    assert "stop" not in seen
    assert "lr: 9.0" in folder.recipe.read_text()
    assert not folder.stop_asked


def test_a_submission_that_is_refused_changes_nothing(
    commands: Commands, folder: ClusterFolder, tmp_path: Path
) -> None:
    folder.ask_for_stop()
    commands(scontrol=FORGOTTEN, sacct="true", srun="true", sbatch=Refusal(folder, 1).script)
    runs = [folder.run, tmp_path / "new"]
    with pytest.raises(BadInput, match="sbatch refused the job"):
        submit([TrainRecipe(str(run)) for run in runs], ClusterRecipe())
    assert "lr: 9.0" in (folder.path / "seen").read_text()
    assert folder.recipe.read_text() == "lr: 1.0\n"
    assert folder.stop_asked
    assert not ClusterFolder(runs[1]).recipe.exists()
    assert len(folder.submissions) == 1


def test_a_job_that_cannot_be_cancelled_is_not_called_cancelled(commands: Commands, folder: ClusterFolder) -> None:
    commands(scontrol=RUNNING.replace("RUNNING", "PENDING"))
    with pytest.raises(BadInput, match="job 7: scancel failed"):
        stop(folder.run)
    commands(scontrol=RUNNING.replace("RUNNING", "PENDING"), scancel="true")
    assert "was taken out of the queue" in stop(folder.run)
