"""The lines of a batch script around srun, in a shell, with a `scontrol` that answers as SLURM would."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cluster.requeue import AFTER, BEFORE, GivenUp, RequeuePermit

LATER, PAST = "2100-01-01T00:00:00", "2020-01-01T00:00:00"


class Job:
    """A job that is run and ended several times."""

    def __init__(self, folder: Path) -> None:
        self.jobs, self.bin = folder / "the jobs", folder / "bin"
        self.files = self.jobs / "7"
        self.files.mkdir(parents=True)
        self.bin.mkdir()

    def end(
        self,
        code: int,
        state: str = "RUNNING",
        *,
        preempted: str = "None",
        limit: str = LATER,
        ended: str | None = None,
        srun: str = "sleep 0.3",
        down: int = 0,
    ) -> tuple[int, bool]:
        """Let srun end with `code`, in a job of this state. The script's exit code, and whether it requeued.

        Args:
            code: of srun.
            state: of the job, at its end.
            preempted: its PreemptTime.
            limit: its EndTime while it runs.
            ended: its EndTime at its end, where that is another one.
            srun: what it runs; from its end on the job is in `state`.
            down: how often the controller does not answer then.
        """
        requeued, over = self.bin / "requeued", self.bin / "over"
        for file in (requeued, over):
            file.unlink(missing_ok=True)
        (self.bin / "down").write_text("x" * down)
        scontrol = self.bin / "scontrol"
        scontrol.write_text(
            f"""#!/bin/sh
if [ -e {over} ] && [ -s {self.bin}/down ]; then
    truncate --size=-1 {self.bin}/down; echo "Unable to contact slurm controller" >&2; exit 1
fi
case "$1 $2" in
"requeue 7") touch {requeued};;
"show job") if [ -e {over} ]
    then echo "JobId=7 JobState={state} EndTime={ended or limit} PreemptTime={preempted} Command=x"
    else echo "JobId=7 JobState=RUNNING EndTime={limit} PreemptTime={preempted} Command=x"
    fi;;
esac
"""
        )
        scontrol.chmod(0o755)
        before = [line.replace("FOLDER", f"'{self.jobs}'") for line in BEFORE]
        script = "\n".join(["#!/bin/bash", *before, f"({srun}; touch {over}; exit {code})", *AFTER])
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
    """SLURM calls the job COMPLETING, like every job whose processes are still ending."""
    for state in ("COMPLETING", "CANCELLED"):
        RequeuePermit(job.files).allow(step=10)
        assert job.end(143, state) == (143, False)


def test_what_the_time_limit_or_a_preemption_ended_is_requeued(job: Job) -> None:
    RequeuePermit(job.files).allow(step=10)
    assert job.end(143, "COMPLETING", limit=PAST) == (0, True)
    RequeuePermit(job.files).allow(step=10)
    assert job.end(143, "COMPLETING", preempted=PAST, ended=PAST) == (0, True), "a preemption without grace time"
    RequeuePermit(job.files).allow(step=10)
    assert job.end(143, "COMPLETING", preempted=PAST, limit=PAST) == (0, True), "the end of a grace time"
    RequeuePermit(job.files).allow(step=10)
    assert job.end(0, limit="Unknown") == (0, True)


def test_what_a_user_cancels_in_a_grace_time_stays_cancelled(job: Job) -> None:
    RequeuePermit(job.files).allow(step=10)
    assert job.end(143, "COMPLETING", preempted=PAST, ended="2020-01-01T00:00:20") == (143, False)
    RequeuePermit(job.files).allow(step=10)
    announced = f"sleep 0.5; touch '{job.files}/signalled'; sleep 2"
    assert job.end(143, "COMPLETING", preempted=PAST, ended=PAST, srun=announced) == (143, False), "in its first second"


def test_workers_that_outlast_the_time_limit_are_requeued_before_the_script_is_killed(job: Job) -> None:
    """The watcher asks while srun still runs, but not for a job that needs no further attempt."""
    permit, requeued = RequeuePermit(job.files), job.bin / "requeued"
    permit.allow(step=10)
    wait = f"for i in $(seq 100); do [ -e {requeued} ] && break; sleep 0.1; done; cp {requeued} {job.bin}/early"
    assert job.end(137, "COMPLETING", limit=PAST, srun=wait) == (0, True)
    assert (job.bin / "early").exists()
    assert not (job.files / "crashes").exists()
    permit.forbid()
    assert job.end(0, "COMPLETING", limit=PAST, srun="sleep 2.5") == (0, False)


def test_a_time_limit_that_was_raised_counts(job: Job) -> None:
    """Somebody runs `scontrol update TimeLimit` while the job runs."""
    RequeuePermit(job.files).allow(step=10)
    srun = f"sleep 0.5; sed -i 's/{PAST}/{LATER}/' {job.bin}/scontrol; sleep 1.5"
    assert job.end(143, "COMPLETING", limit=PAST, srun=srun) == (143, False)


def test_a_signal_makes_the_script_look_for_the_end_again(job: Job) -> None:
    """A preemption was announced: the grace time ends before the time limit, and SLURM cancels the job then."""
    permit = RequeuePermit(job.files)
    permit.allow(step=10)
    srun = f"sleep 0.8; sed -i 's/{LATER}/{PAST}/' {job.bin}/scontrol; touch '{job.files}/signalled'; sleep 2.5"
    assert job.end(143, "COMPLETING", ended=LATER, srun=srun) == (0, True)


@pytest.mark.slow
def test_a_controller_that_is_down_is_asked_again(job: Job) -> None:
    RequeuePermit(job.files).allow(step=10)
    assert job.end(1, down=3) == (0, True)
    assert (job.files / "crashes").read_text() == "10\n"


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
        job.end(143, "COMPLETING", limit=PAST)
    for _ in range(6):
        permit.allow(step=10)
        assert job.end(0) == (0, True)
