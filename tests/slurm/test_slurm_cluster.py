"""The test cluster itself: it starts in seconds, and leaves nothing behind, whatever happens in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from slurm.slurm_cluster import CGROUPS, SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def command_lines() -> list[str]:
    """The command lines of all processes; a zombie has none."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
    return found


def fail_with_a_job(slurm: SlurmCluster) -> None:
    with slurm:
        job = slurm.sbatch("trap '' TERM; srun sleep 31415926", "--nodes=2")
        slurm.wait_for_state(job, "RUNNING")
        slurm.wait_for(lambda: sum("sleep 31415926" in line for line in command_lines()) >= 2, "tasks")
        raise ZeroDivisionError


@pytest.mark.parametrize("accounting", [True, False])
def test_nothing_is_left_after_a_failure(possible: None, accounting: bool) -> None:
    """A failure while a job runs on two nodes whose tasks ignore TERM."""
    cluster = SlurmCluster(nodes=2, accounting=accounting)
    with pytest.raises(ZeroDivisionError):
        fail_with_a_job(cluster)
    assert not cluster.folder.exists()
    assert not [line for line in command_lines() if str(cluster.folder) in line or "sleep 31415926" in line]
    assert not [group for node in cluster.nodes for group in CGROUPS.glob(f"*/**/*{node}*")]
