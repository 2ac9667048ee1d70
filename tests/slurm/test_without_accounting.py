"""A cluster without slurmdbd: everything works without `sacct`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm.runs import Run
from slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture
def plain(possible: None) -> Iterator[SlurmCluster]:
    """Two nodes, no accounting."""
    with SlurmCluster(nodes=2, accounting=False) as cluster:
        yield cluster


def test_submit_preempt_status_stop(plain: SlurmCluster, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="accounting"):
        plain.run("sacct")
    run = Run(plain, dataset, tmp_path)
    job = run.submit(steps=100_000)
    run.wait_for_step(10)
    said = run.sharebert("status", str(run.path))
    assert "state     running" in said
    assert f"job       {job} (running)" in said
    assert f"step      {run.step} of 100000" in said or "of 100000" in said

    plain.sbatch("sleep 1", "--partition=high", "--nodes=2", "--exclusive")
    run.wait_for_attempts(2)
    before = run.step
    run.wait_for_step(before + 10)
    assert "will save and end" in run.sharebert("stop", str(run.path))
    plain.wait_for_state(job, "COMPLETED", explain=run.tail)
    said = run.sharebert("status", str(run.path))
    assert "state     stopped" in said
    assert "attempts  2" in said
    assert run.folder.checkpoint == run.step
    attempts = run.steps_of_each_attempt()
    assert attempts[0][-1] + 1 == attempts[1][0]
