"""The last lines of a batch script, in a shell, with a `scontrol` that says what SLURM would."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cluster.requeue import AFTER, BEFORE, GivenUp, RequeuePermit


class Job:
    """A job that ends again and again."""

    def __init__(self, folder: Path) -> None:
        self.jobs, self.bin = folder / "the jobs", folder / "bin"
        self.files = self.jobs / "7"
        self.files.mkdir(parents=True)
        self.bin.mkdir()

    def end(
        self, code: int, state: str = "RUNNING", *, preempted: str = "None", limit: str = "2100-01-01T00:00:00"
    ) -> tuple[int, bool]:
        """Let srun end with `code`, in a job of this state. The script's exit code, and whether it requeued."""
        requeued = self.bin / "requeued"
        requeued.unlink(missing_ok=True)
        scontrol = self.bin / "scontrol"
        facts = f"JobId=7 JobState={state} EndTime={limit} PreemptTime={preempted} Command=x"
        scontrol.write_text(
            f'#!/bin/sh\ncase "$1 $2" in "requeue 7") touch {requeued};; "show job") echo "{facts}";; esac\n'
        )
        scontrol.chmod(0o755)
        after = [line.replace("FOLDER", f"'{self.jobs}'") for line in AFTER]
        script = "\n".join(["#!/bin/bash", *BEFORE, f"(exit {code})", "", *after])
        done = subprocess.run(
            ["bash", "-c", script], env={"PATH": f"{self.bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}, check=False
        )
        return done.returncode, requeued.exists()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_job_whose_agent_said_that_it_is_over_ends(job: Job) -> None:
    permit = RequeuePermit(job.files)
    permit.allow(step=10)
    permit.forbid()
    assert job.end(0) == (0, False)
    permit.allow(step=10)
    permit.forbid()
    assert job.end(1) == (1, False)


def test_a_job_whose_agent_never_came_to_life_ends(job: Job) -> None:
    assert job.end(127) == (127, False)


def test_a_job_that_stopped_or_crashed_is_requeued(job: Job) -> None:
    permit = RequeuePermit(job.files)
    permit.allow(step=10)
    assert job.end(0) == (0, True)
    assert job.end(0) == (0, False), "the permit is used up"
    permit.allow(step=10)
    assert job.end(137) == (0, True)


def test_what_a_user_cancelled_stays_cancelled(job: Job) -> None:
    """SLURM calls it completing, as it calls all jobs whose processes are still ending."""
    for state in ("COMPLETING", "CANCELLED"):
        RequeuePermit(job.files).allow(step=10)
        assert job.end(143, state) == (143, False)


def test_what_the_time_limit_or_a_preemption_ended_is_requeued(job: Job) -> None:
    RequeuePermit(job.files).allow(step=10)
    assert job.end(143, "COMPLETING", limit="2020-01-01T00:00:00") == (0, True)
    RequeuePermit(job.files).allow(step=10)
    assert job.end(143, "COMPLETING", preempted="2026-01-01T00:00:00") == (0, True)
    RequeuePermit(job.files).allow(step=10)
    assert job.end(0, limit="Unknown") == (0, True)


def test_the_third_crash_at_a_step_is_the_last(job: Job) -> None:
    permit = RequeuePermit(job.files)
    for _ in range(3):
        permit.allow(step=10)
        job.end(1)
    with pytest.raises(GivenUp, match="3 attempts in a row crashed without progress beyond step 10"):
        permit.allow(step=10)
    permit.allow(step=20)  # it made progress


def test_what_slurm_ends_is_never_counted(job: Job) -> None:
    permit = RequeuePermit(job.files)
    for _ in range(6):
        permit.allow(step=10)
        job.end(143, "COMPLETING", limit="2020-01-01T00:00:00")
    for _ in range(6):
        permit.allow(step=10)
        assert job.end(0) == (0, True)
