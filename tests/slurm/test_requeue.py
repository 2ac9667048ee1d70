"""Ends that SLURM announces: the run saves, the job requeues itself, and resumes without repeating a step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import pytest
from slurm.runs import BASELINE_STEPS, Run
from slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_three_preemptions(
    run: Run, slurm: SlurmCluster, high_priority: Callable[[], str], baseline: list[float]
) -> None:
    steps = 3 * BASELINE_STEPS  # an attempt makes some 45 before it is preempted, and must not come to the end
    job = run.submit(steps=steps)
    for number in range(1, 4):
        run.wait_for_step(run.step + 25)
        high_priority()
        slurm.wait_for_state(job, "PENDING")
        run.wait_for_attempts(number + 1)
    run.finish(job)
    run.same_as(baseline)
    attempts = run.steps_of_each_attempt()
    assert len(attempts) == 4
    assert list(chain(*attempts)) == list(range(1, steps + 1)), "a step was done twice, or never"


def test_requeue_by_hand_and_a_signal(run: Run, slurm: SlurmCluster, baseline: list[float]) -> None:
    """`scontrol requeue` gives no warning, only KillWait seconds for the save; `scancel --signal` is a warning."""
    job = run.submit(checkpoint__every=40)
    run.wait_for_step(50)
    slurm.run("scontrol", "requeue", job)
    run.wait_for_attempts(2)
    first = run.steps_of_each_attempt()[0][-1]
    run.wait_for_step(first + 20)
    slurm.run("scancel", "--signal=USR1", job)
    run.wait_for_attempts(3)
    run.finish(job)
    run.same_as(baseline)
    attempts = run.steps_of_each_attempt()
    assert attempts[1][0] > first - 40, "steps since the last checkpoint at most"
    assert attempts[1][-1] + 1 == attempts[2][0], "the signal came in time"


def test_the_time_limit_twice(run: Run, slurm: SlurmCluster, baseline: list[float]) -> None:
    """SLURM's shortest limit is a minute. The run has no end, and is stopped after the second one."""
    job = run.submit("--time=1", steps=1_000_000)
    run.wait_for_attempts(3)
    run.wait_for_step(run.step + 5)
    assert "will save and end" in run.sharebert("stop", str(run.path))
    slurm.wait_for_state(job, "COMPLETED")
    assert run.folder.state["state"] == "stopped"
    assert run.folder.checkpoint == run.step
    run.same_as(baseline)
    attempts = run.steps_of_each_attempt()
    assert len(attempts) == 3
    assert list(chain(*attempts)) == list(range(1, run.step + 1)), "a step was done twice, or never"
    assert "stopped (signal SIGTERM)" in run.sharebert("status", str(run.path))
