"""What the pre-flight finds on real nodes: each job fails in seconds, with one line, and is not requeued."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_dataset
from slurm.runs import Run
from slurm.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def refusal(run: Run, job: str) -> str:
    """The reason that `sharebert status` gives for a failed job."""
    run.slurm.wait_for_state(job, "FAILED", "COMPLETED", timeout_s=120, explain=run.tail)
    assert run.slurm.job(job)["JobState"] == "FAILED"
    assert len(run.folder.attempts) == 1
    assert not run.folder.log, "nothing was trained"
    said = run.sharebert("status", str(run.path))
    assert "failed (" in said
    return said


def test_a_name_that_a_node_does_not_know(run: Run, slurm: SlurmCluster, tmp_path: Path) -> None:
    first, second = slurm.nodes[:2]
    hosts = tmp_path / "hosts"
    hosts.write_text("\n".join(line for line in slurm.network.file.read_text().splitlines() if first not in line))
    slurm.host(second).run("mount", "--bind", str(hosts), "/etc/hosts")
    try:
        job = run.submit("--set=preflight=true", f"--set=sbatch.nodelist='{first},{second}'")
        assert f"{second} does not know the address of node '{first}'" in refusal(run, job)
    finally:
        slurm.host(second).run("umount", "/etc/hosts")


def test_a_port_that_is_closed(run: Run, slurm: SlurmCluster) -> None:
    first, second = slurm.nodes[:2]
    rule = ["INPUT", "-p", "tcp", "--dport", "23456", "-j", "REJECT", "--reject-with", "tcp-reset"]
    slurm.host(first).run("iptables", "-A", *rule)
    try:
        flags = ["--set=preflight=true", "--set=port=23456", f"--set=sbatch.nodelist='{first},{second}'"]
        said = refusal(run, run.submit(*flags))
        assert "did not report" in said or f"{second} cannot reach {first} on port 23456" in said
        assert f"{second} cannot reach {first} on port 23456" in run.tail()
    finally:
        slurm.host(first).run("iptables", "-D", *rule)


def test_a_dataset_that_is_another_one_on_one_node(run: Run, slurm: SlurmCluster, tmp_path: Path) -> None:
    """This happens where a dataset is copied to each node's own disk."""
    first, second = slurm.nodes[:2]
    run.dataset = tmp_path / "staged"
    make_dataset(run.dataset)
    other = make_dataset(tmp_path / "other", seed=1)
    slurm.host(second).run("mount", "--bind", str(other), str(run.dataset))
    try:
        said = refusal(run, run.submit("--set=preflight=true", f"--set=sbatch.nodelist='{first},{second}'"))
        assert f"dataset {run.dataset} is not the same on all nodes" in said
        assert f"on {second}" in said
    finally:
        slurm.host(second).run("umount", str(run.dataset))


def test_a_disk_that_is_full(run: Run, small_disk: Path) -> None:
    """A file system of 8 MB that all nodes share."""
    run.move_to(small_disk)
    run.cluster.write_text(run.cluster.read_text().replace("free_gb: 0.01", "free_gb: 0"))
    said = refusal(run, run.submit("--set=preflight=true", nodes=1))
    assert f"{run.path}: cannot be written to (No space left on device)" in said


def test_a_disk_that_has_too_little_room(run: Run, small_disk: Path) -> None:
    run.move_to(small_disk / "other")
    said = refusal(run, run.submit("--set=preflight=true", nodes=1))
    assert "GB free, the recipe wants 0.01 (free_gb)" in said
