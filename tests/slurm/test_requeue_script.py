"""The lines around srun in a real job: a job that SLURM ends is requeued, one that a user cancels is not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from slurm.slurm_cluster import SlurmCluster

from cluster.requeue import AFTER, BEFORE

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def submit(slurm: SlurmCluster, folder: Path, *options: str, srun: str = "sleep 300") -> str:
    """A job whose agent allowed a requeue; by default it takes no notice of any warning."""
    before = [line.replace("FOLDER", str(folder)) for line in BEFORE]
    agent = [f"echo 0 > {folder}/$job/requeue", f"echo start >> {folder}/$job/starts"]
    script = folder / "script.sh"
    script.write_text("\n".join(["#!/bin/bash", *before, *agent, f"srun {srun}", *AFTER]) + "\n")
    return slurm.run("sbatch", "--parsable", "--requeue", f"--output={folder}/log", *options, str(script)).strip()


def starts(folder: Path, job: str) -> int:
    file = folder / job / "starts"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_time_limit_and_cancel(slurm: SlurmCluster, tmp_path: Path) -> None:
    limited, cancelled = tmp_path / "limited", tmp_path / "cancelled"
    for folder in (limited, cancelled):
        folder.mkdir()
    job, victim = submit(slurm, limited, "--time=1"), submit(slurm, cancelled)
    slurm.wait_for(lambda: starts(cancelled, victim) == 1, "a start")
    slurm.run("scontrol", "requeue", victim)
    slurm.wait_for(lambda: starts(cancelled, victim) == 2, "a second start")
    slurm.run("scancel", victim)
    cancelled_at = starts(cancelled, victim)
    slurm.wait_for(lambda: starts(limited, job) == 2, "a start after the time limit", 200)
    slurm.run("scancel", job)
    for number in (job, victim):
        slurm.wait_for_state(number, "CANCELLED")
    assert starts(cancelled, victim) == cancelled_at
    assert not (limited / job / "crashes").exists()
    assert not (cancelled / victim / "crashes").exists()


def test_cancel_after_a_preemption(slurm: SlurmCluster, tmp_path: Path) -> None:
    """The job was preempted before, but not when it is cancelled."""
    job = submit(slurm, tmp_path, f"--nodes={len(slurm.nodes)}", "--exclusive")
    slurm.wait_for(lambda: starts(tmp_path, job) == 1, "a start")
    slurm.sbatch("sleep 1", "--partition=high", f"--nodes={len(slurm.nodes)}", "--exclusive")
    slurm.wait_for(lambda: starts(tmp_path, job) == 2, "a start after the preemption", 240)
    slurm.run("scancel", job)
    slurm.wait_for_state(job, "CANCELLED")


def test_workers_that_outlast_the_time_limit(slurm: SlurmCluster, tmp_path: Path) -> None:
    """They ignore TERM, so that SLURM kills them together with the batch script."""
    job = submit(slurm, tmp_path, "--time=1", srun="bash -c \"trap '' TERM; while :; do sleep 1; done\"")
    slurm.wait_for(lambda: starts(tmp_path, job) == 2, "a start after the time limit", 240)
    assert not (tmp_path / job / "crashes").exists()
    slurm.run("scancel", job)
    slurm.wait_for_state(job, "CANCELLED")


def test_cancel_in_the_grace_time_of_a_preemption(slurm: SlurmCluster, tmp_path: Path) -> None:
    agent = f"bash -c \"trap 'touch {tmp_path}/\\$SLURM_JOB_ID/signalled' USR2; while :; do sleep 0.2; done\""
    job = submit(slurm, tmp_path, f"--nodes={len(slurm.nodes)}", "--exclusive", "--signal=USR2@10", srun=agent)
    deadline = tmp_path / job / "deadline"
    slurm.wait_for(deadline.exists, "a look at the time limit")
    time.sleep(5)  # the agent is there by now
    before = deadline.read_text()
    slurm.sbatch("sleep 1", "--partition=high", f"--nodes={len(slurm.nodes)}", "--exclusive")
    slurm.wait_for(lambda: deadline.read_text() < before, "a look at the end of the grace time")
    slurm.run("scancel", job)
    slurm.wait_for_state(job, "CANCELLED")
    # Not "1": where the machine stalls, SLURM gives up a node, and starts the job anew before the preemption.
    cancelled_at = starts(tmp_path, job)
    time.sleep(10)  # a requeue would begin cred_expire after the end
    assert slurm.job(job)["JobState"] == "CANCELLED"
    assert starts(tmp_path, job) == cancelled_at, (tmp_path / "log").read_text()


def test_a_crash_while_the_controller_is_down(slurm: SlurmCluster, tmp_path: Path) -> None:
    crash = tmp_path / "crash"
    job = submit(slurm, tmp_path, srun=f"bash -c 'while [ ! -e {crash} ]; do sleep 0.1; done; rm {crash}; exit 1'")
    slurm.wait_for(lambda: starts(tmp_path, job) == 1, "a start")
    time.sleep(10)  # a controller that is killed at once forgets the start
    slurm.kill_controller()
    crash.touch()
    time.sleep(30)
    slurm.start_controller()
    slurm.wait_for(lambda: starts(tmp_path, job) == 2, "a start after the crash", 120)
    assert (tmp_path / job / "crashes").read_text() == "0\n"
    slurm.run("scancel", job)
    slurm.wait_for_state(job, "CANCELLED")
