"""Faults without a warning: killed processes, dead nodes, cut networks. Only the steps since a checkpoint are lost."""

from __future__ import annotations

import os
import signal
from itertools import pairwise

import pytest
from slurm.runs import Run
from slurm.slurm_cluster import SlurmCluster

from pretrain.run.folder import RunFolder

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

EVERY = 15
"""Steps between checkpoints."""


def workers(slurm: SlurmCluster, node: str) -> list[int]:
    """The workers of a node, without torchrun, whose command line names their module as well."""
    return slurm.host(node).processes("-m pretrain", but="torch.distributed.run")


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def lost_at_most_a_checkpoint(run: Run, baseline: list[float]) -> None:
    run.same_as(baseline)
    attempts = run.steps_of_each_attempt()
    for before, after in pairwise(attempts):
        assert before[-1] - EVERY - 1 <= after[0] <= before[-1] + 1, (before[-1], after[0])


def test_processes_are_killed(run: Run, slurm: SlurmCluster, baseline: list[float]) -> None:
    """A worker: torchrun restarts all in place. An agent: the job is requeued. slurmctld: the training continues."""
    job = run.submit(checkpoint__every=EVERY)
    run.wait_for_step(2 * EVERY)
    first, second = run.folder.attempts[0]["nodes"]
    kill(workers(slurm, second)[0])
    slurm.wait_for(lambda: len(run.steps_of_each_attempt()) == 2, "workers started in place", 240, run.tail)
    assert len(run.folder.attempts) == 1, "the job was not requeued"

    run.wait_for_step(run.step + EVERY + 5)
    slurm.kill_controller()
    kill(min(slurm.host(first).processes("submitit.core._submit", but="srun")))
    slurm.start_controller()
    run.wait_for_attempts(2)
    run.finish(job)
    lost_at_most_a_checkpoint(run, baseline)


def test_a_node_dies(run: Run, slurm: SlurmCluster, baseline: list[float]) -> None:
    """The power of a node fails; the run resumes on a spare node, and the dead node comes back later."""
    job = run.submit(checkpoint__every=EVERY)
    run.wait_for_step(2 * EVERY + 5)
    dead = run.folder.attempts[0]["nodes"][1]
    slurm.host(dead).power_cut()
    run.wait_for_attempts(2)
    assert dead not in run.folder.attempts[1]["nodes"]
    slurm.replace_node(dead)
    run.finish(job)
    lost_at_most_a_checkpoint(run, baseline)


def test_a_network_is_cut(run: Run, slurm: SlurmCluster, baseline: list[float]) -> None:
    """The node that is cut off still runs its workers; the new attempt has the run all the same."""
    job = run.submit(checkpoint__every=EVERY)
    run.wait_for_step(2 * EVERY + 5)
    lonely = run.folder.attempts[0]["nodes"][0]
    slurm.host(lonely).cut_off()
    run.wait_for_attempts(2)
    assert lonely not in run.folder.attempts[1]["nodes"]
    slurm.wait_for(lambda: not workers(slurm, lonely), "workers cut off have ended", 60, run.tail)
    slurm.host(lonely).plug_in()
    run.finish(job)
    lost_at_most_a_checkpoint(run, baseline)


def test_a_run_that_trains_by_hand_is_refused_once(run: Run, slurm: SlurmCluster) -> None:
    """The job ends, and is not requeued while the other attempt trains."""
    other = RunFolder(run.path)
    other.occupy()
    try:
        job = run.submit(nodes=1)
        slurm.wait_for_state(job, "FAILED", "COMPLETED", timeout_s=120, explain=run.tail)
    finally:
        other.release()
    assert slurm.job(job)["JobState"] == "FAILED"
    assert len(run.folder.attempts) == 1
    assert "in use by another attempt of this run" in run.tail()


def test_a_run_that_crashes_at_the_same_step_is_given_up(run: Run, slurm: SlurmCluster) -> None:
    """A learning rate that makes every loss a NaN: the job does not requeue for ever, and says what the worker said."""
    flags = ["--set=max_restarts=0", "--procs-per-node=1"]
    job = run.submit(*flags, nodes=1, optimizer__lr=1e38, faults__max_skipped=2)
    slurm.wait_for_state(job, "FAILED", "COMPLETED", timeout_s=300, explain=run.tail)
    assert run.folder.state["state"] == "failed"
    assert 3 <= len(run.folder.attempts) <= 4
    assert "TooManyFaults" in run.sharebert("logs", str(run.path), "--failed")
    assert "failed" in run.sharebert("status", str(run.path))
