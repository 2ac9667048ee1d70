"""The cluster recipe: what to ask SLURM for, and how to set up a node."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt
from pydantic.dataclasses import dataclass

from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT, load


def _text(value: Any) -> Any:
    """Refuse a number: YAML reads an unquoted 24:00:00 as 86,400, which SLURM would read as minutes."""
    if isinstance(value, int | float):
        raise ValueError(f"{value!r} is a number; write the time in quotes, '24:00:00' or '90' (minutes)")
    return value


@dataclass(config=STRICT, kw_only=True)
class ContainerRecipe:
    """A container image that holds Python and this project."""

    image: str
    """Image: a .sif file for Apptainer; for Pyxis a value of `srun --container-image`."""
    kind: Literal["apptainer", "pyxis"] = "apptainer"
    """Program that runs the image."""
    options: list[str] = field(default_factory=list)
    """Further options of `apptainer exec` or `srun`, such as `--bind=/data`."""
    python: str = "python"
    """Python inside the image."""


@dataclass(config=STRICT, kw_only=True)
class ClusterRecipe:
    """Where a stage runs, and on how much."""

    SHORTHAND: ClassVar[dict[str, str]] = {"container": "image"}

    launcher: Literal["slurm", "local"] = "slurm"
    """`slurm` submits a job; `local` runs the same code on this machine, without SLURM."""
    nodes: PositiveInt = 1
    """Number of nodes of a training; for `prep`, number of tasks of the array."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """Number of GPUs of each node."""
    procs_per_node: PositiveInt | None = None
    """Number of processes of each node; none: one for each GPU, or one where there is no GPU."""
    cpus_per_process: PositiveInt = 4
    """Number of CPU cores of each process."""
    time: Annotated[str | None, BeforeValidator(_text)] = None
    """Time limit of the job as SLURM writes it, in quotes: '24:00:00', '2-00:00:00'; none: the partition's limit. A run
    that needs more time saves, requeues itself and resumes, as often as it takes."""
    signal_s: Annotated[int, Field(ge=1, le=65535)] = 120
    """How many seconds before the time limit the run is asked to save; SLURM may ask a minute earlier."""
    partition: str | None = None
    """Partition of SLURM to use; none: the default one."""
    account: str | None = None
    """Account of SLURM that is charged."""
    qos: str | None = None
    """Quality of service of SLURM to ask for."""
    memory: str | None = None
    """Memory of each node, such as '64G'; '0' asks for all of it; none: the cluster's default."""
    constraint: str | None = None
    """Features that the nodes must have."""
    exclude: str | None = None
    """Nodes that the job must not use."""
    sbatch: dict[str, str | int | bool | None] = field(default_factory=dict)
    """Any further options of sbatch, without the dashes in front: {reservation: x}; they win over all other keys, and
    false or null takes an option back."""
    container: ContainerRecipe | None = None
    """Container image that the job runs in; a plain value means container.image."""
    env: dict[str, str | int] = field(default_factory=dict)
    """Environment variables of the workers, such as those of NCCL."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that each node runs before every attempt; the workers see the variables that they export."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often torchrun restarts crashed workers in place; then the job is requeued."""
    port: Annotated[int | None, Field(ge=1024, le=65534)] = None
    """Port of the rendezvous on the first node; the pre-flight takes the port after it; none: from the job id, 20000 to
    29999."""
    preflight: bool = True
    """Check nodes, network, files and GPUs before each attempt."""
    min_bandwidth: Annotated[float, Field(ge=0)] = 0.0
    """Lowest bus bandwidth in GB/s of the pre-flight's all-reduce over all GPUs; below it, the job fails at once. NCCL
    takes TCP without a word where it finds no InfiniBand. A job of one process is not measured."""
    free_gb: Annotated[float, Field(ge=0)] = 10.0
    """Free space in GB that the run directory must have at each attempt."""

    def __post_init__(self) -> None:
        """Refuse several nodes on one machine."""
        if self.launcher == "local" and self.nodes > 1:
            raise ValueError("nodes: this machine is one node; submit to SLURM, or set nodes to 1")

    @property
    def processes(self) -> int:
        """Number of processes of a node."""
        return self.procs_per_node or max(1, self.gpus_per_node)


def load_cluster(name: str, overrides: list[str]) -> ClusterRecipe:
    """Read a cluster recipe, given by path or by its name in `configs/cluster`."""
    is_path = Path(name).expanduser().is_file() or "/" in name
    return load(ClusterRecipe, name if is_path else f"cluster/{name}", overrides)


def minutes(time: str) -> int:
    """A time as SLURM writes it, in whole minutes, rounded up. Raises BadInput."""
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, days if dash else "0"]) or len(parts) > 3:
        raise BadInput(f"time: '{time}': write it as SLURM does: '90' (minutes), '24:00:00' or '2-00:00:00'")
    numbers = [int(part) for part in parts]
    if dash:  # D-H, D-H:M, D-H:M:S
        hours, mins, seconds = numbers + [0] * (3 - len(numbers))
    elif len(numbers) == 3:  # H:M:S
        hours, mins, seconds = numbers
    else:  # M, M:S
        hours, (mins, seconds) = 0, numbers + [0] * (2 - len(numbers))
    return int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0)
