"""The lines around srun in a real job: what SLURM ends starts again, what a user cancels does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm.slurm_cluster import SlurmCluster

from cluster.requeue import AFTER, BEFORE

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def submit(slurm: SlurmCluster, folder: Path, *options: str) -> str:
    """A job that takes no notice of any warning; its agent left it to start again."""
    after = [line.replace("FOLDER", str(folder)) for line in AFTER]
    agent = [f"mkdir -p {folder}/$job", f"echo 0 > {folder}/$job/requeue", f"echo start >> {folder}/$job/starts"]
    script = folder / "script.sh"
    script.write_text("\n".join(["#!/bin/bash", *BEFORE, *agent, "srun sleep 300", *after]) + "\n")
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
    slurm.wait_for(lambda: starts(limited, job) == 2, "a start after the time limit", 200)
    slurm.run("scancel", job)
    for number in (job, victim):
        slurm.wait_for_state(number, "CANCELLED")
    assert starts(cancelled, victim) == 2
    assert not (limited / job / "crashes").exists()
    assert not (cancelled / victim / "crashes").exists()


def test_cancel_after_a_preemption(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Such a job was preempted once, but not now."""
    job = submit(slurm, tmp_path, f"--nodes={len(slurm.nodes)}", "--exclusive")
    slurm.wait_for(lambda: starts(tmp_path, job) == 1, "a start")
    slurm.sbatch("sleep 1", "--partition=high", f"--nodes={len(slurm.nodes)}", "--exclusive")
    slurm.wait_for(lambda: starts(tmp_path, job) == 2, "a start after the preemption", 240)
    slurm.run("scancel", job)
    slurm.wait_for_state(job, "CANCELLED")
