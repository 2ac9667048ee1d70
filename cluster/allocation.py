"""Where an agent runs: which node of which attempt of which job."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PORTS = range(20_000, 30_000)
"""Below the ports that Linux gives to outgoing connections."""


@dataclass(frozen=True)
class Allocation:
    """The nodes of one attempt, seen from one of them."""

    job: str
    """Id of the job, as `scontrol` takes it; for a task of an array `ARRAY_TASK`."""
    restart: int
    """How often the job was requeued before this attempt."""
    node: int
    """Number of this node in the job."""
    nodes: tuple[str, ...]
    """Names of all nodes, in the job's order."""
    folder: Path
    """The job's folder: submitit's files and the logs of the nodes."""
    port: int
    """Port of the rendezvous on the first node; the pre-flight takes the port after it."""

    @property
    def attempt(self) -> str:
        """Name of this attempt; no other attempt of any job has it."""
        return f"{self.job}.{self.restart}"

    @property
    def name(self) -> str:
        """Name of this node."""
        return self.nodes[self.node]

    @property
    def is_first(self) -> bool:
        """Whether this is the first node, which does what is done once."""
        return self.node == 0


def current_allocation(port: int | None) -> Allocation:
    """The allocation of this agent; `port` where the recipe sets one."""
    from submitit import JobEnvironment

    environment = JobEnvironment()
    local = environment.cluster == "local"
    return Allocation(
        job=environment.job_id,
        restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        node=environment.node,
        nodes=("localhost",) if local else tuple(environment.hostnames),
        folder=environment.paths.folder,
        port=port or port_of(int(environment.raw_job_id)),
    )


def port_of(job: int) -> int:
    """The rendezvous port of a job. Two jobs may share a node, so each job has two ports of its own."""
    return PORTS.start + 2 * job % len(PORTS)
