"""The cluster that the tests of this folder share, and runs on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm.runs import Run
from slurm.slurm_cluster import SlurmCluster, not_possible_here
from tiny_runs import losses

NO_SKIP = "SHAREBERT_NO_SKIP"
"""Where this variable is set, tests fail that would be skipped without SLURM. Continuous integration sets it."""


@pytest.fixture(scope="session")
def possible() -> None:
    """Skip the test without SLURM, or fail it where NO_SKIP is set."""
    reason = not_possible_here()
    if reason and os.environ.get(NO_SKIP):
        pytest.fail(f"{NO_SKIP} is set, and there is {reason}")
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def small_disk(possible: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of 8 MB; hosts that are made later see it as well."""
    folder = tmp_path_factory.mktemp("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "sharebert-test", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def shared(small_disk: Path) -> Iterator[SlurmCluster]:
    """A cluster of three nodes with accounting."""
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(shared: SlurmCluster) -> Iterator[SlurmCluster]:
    """The shared cluster, idle; all jobs are cancelled after the test."""
    yield shared
    shared.clear()


@pytest.fixture(scope="session")
def undisturbed(shared: SlurmCluster, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of 2 nodes with 2 ranks each, with a pre-flight."""
    run = Run(shared, dataset, tmp_path_factory.mktemp("undisturbed"))
    run.finish(run.submit("--set=preflight=true", "--time=20"))
    return run


@pytest.fixture(scope="session")
def baseline(undisturbed: Run) -> list[float]:
    """The losses of the undisturbed run."""
    return losses(undisturbed.path)


@pytest.fixture
def run(slurm: SlurmCluster, dataset: Path, tmp_path: Path) -> Run:
    """A run that is not submitted yet."""
    return Run(slurm, dataset, tmp_path)


@pytest.fixture
def high_priority(slurm: SlurmCluster) -> Callable[[], str]:
    """A function that submits a colleague's short job; it takes all nodes from jobs of low priority."""

    def submit() -> str:
        return slurm.sbatch("sleep 1", "--partition=high", f"--nodes={len(slurm.nodes)}", "--exclusive")

    return submit
