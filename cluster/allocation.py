"""Where an agent is: which node of which start of which job."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PORTS = range(20_000, 30_000)
"""Below those that Linux gives to outgoing connections."""


@dataclass(frozen=True)
class Place:
    """One node of a start."""

    job: str
    """Id of the job, as `scontrol` takes it; of an array's task `ARRAY_TASK`."""
    restart: int
    """How often the job was requeued before."""
    node: int
    """Number of this node in the job."""
    nodes: tuple[str, ...]
    """Names of all nodes, in the job's order."""
    folder: Path
    """The job's folder: submitit's files and the logs of its nodes."""
    port: int
    """Port of the rendezvous on the first node; the one after it is the pre-flight's."""

    @property
    def start(self) -> str:
        """Name of this start: no other start of any job has it."""
        return f"{self.job}.{self.restart}"

    @property
    def name(self) -> str:
        """Name of this node."""
        return self.nodes[self.node]

    @property
    def is_first(self) -> bool:
        """Whether this node does what is done once."""
        return self.node == 0


def here(port: int | None) -> Place:
    """This agent's place; `port` where the recipe sets one."""
    from submitit import JobEnvironment

    environment = JobEnvironment()
    local = environment.cluster == "local"
    return Place(
        job=environment.job_id,
        restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        node=environment.node,
        nodes=("localhost",) if local else tuple(environment.hostnames),
        folder=environment.paths.folder,
        port=port or port_of(int(environment.raw_job_id)),
    )


def port_of(job: int) -> int:
    """A port for a job, and the one after it for its pre-flight: jobs may share a node, and so an address."""
    return PORTS.start + 2 * job % len(PORTS)
