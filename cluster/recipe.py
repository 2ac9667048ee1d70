"""The recipe of a submission: what to ask SLURM for, and how a node is set up."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt
from pydantic.dataclasses import dataclass

from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT, load


def _text(value: Any) -> Any:
    """YAML reads an unquoted 24:00:00 as the number 86,400, which SLURM would take for minutes."""
    if isinstance(value, int | float):
        raise ValueError(f"{value!r} is a number; write the time in quotes, '24:00:00' or '90' (minutes)")
    return value


@dataclass(config=STRICT, kw_only=True)
class ContainerRecipe:
    """An image that holds Python and this project."""

    image: str
    """A .sif file for Apptainer; for Pyxis what `srun --container-image` takes."""
    kind: Literal["apptainer", "pyxis"] = "apptainer"
    """Who runs it."""
    options: list[str] = field(default_factory=list)
    """Further options of `apptainer exec` or `srun`, as `--bind=/data`."""
    python: str = "python"
    """Python inside the image."""


@dataclass(config=STRICT, kw_only=True)
class ClusterRecipe:
    """Where a stage runs, and on how much."""

    SHORTHAND: ClassVar[dict[str, str]] = {"container": "image"}

    launcher: Literal["slurm", "local"] = "slurm"
    """`local` runs the same path on this machine, without SLURM."""
    nodes: PositiveInt = 1
    """Nodes of a training; of `prep`, tasks of the array."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs of each node."""
    procs_per_node: PositiveInt | None = None
    """Processes of each node; none: one a GPU, or one without GPUs."""
    cpus_per_process: PositiveInt = 4
    """CPU cores of each process."""
    time: Annotated[str | None, BeforeValidator(_text)] = None
    """Time limit of the job as SLURM writes it, in quotes: '24:00:00', '2-00:00:00'; none: the partition's. A run that
    needs longer goes on by itself, as often as it takes."""
    signal_s: Annotated[int, Field(ge=1, le=65535)] = 120
    """Seconds before the time limit at which the run is asked to save; SLURM may be a minute early."""
    partition: str | None = None
    """SLURM's partition."""
    account: str | None = None
    """SLURM's account."""
    qos: str | None = None
    """SLURM's quality of service."""
    memory: str | None = None
    """Memory of each node, as '64G'; '0' is all of it; none: the cluster's default."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclude: str | None = None
    """Nodes to leave out."""
    sbatch: dict[str, str | int | bool] = field(default_factory=dict)
    """Any further option of sbatch, without its dashes: {reservation: x}; wins over all others."""
    container: ContainerRecipe | None = None
    """Image to run in; a plain value means container.image."""
    env: dict[str, str | int] = field(default_factory=dict)
    """Environment variables of the workers: NCCL's, offline switches."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that each node runs first, before every start; what they export the workers see."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often torchrun restarts crashed workers in place; after that the job is requeued."""
    port: Annotated[int | None, Field(ge=1024, le=65534)] = None
    """Port of the rendezvous on the first node, and the one after it; none: from the job id, 20000 to 29999."""
    preflight: bool = True
    """Check nodes, network, files and GPUs before each start."""
    free_gb: Annotated[float, Field(ge=0)] = 10.0
    """Room that the run directory must have at each start."""

    def __post_init__(self) -> None:
        """Refuse what the launcher cannot do."""
        if self.launcher == "local" and self.nodes > 1:
            raise ValueError("nodes: this machine is one node; submit to SLURM, or set nodes to 1")

    @property
    def processes(self) -> int:
        """Processes of a node."""
        return self.procs_per_node or max(1, self.gpus_per_node)


def load_cluster(name: str, overrides: list[str]) -> ClusterRecipe:
    """The recipe of a path, or of a name among those under `configs/cluster`."""
    is_path = Path(name).is_file() or "/" in name
    return load(ClusterRecipe, name if is_path else f"cluster/{name}", overrides)


def minutes(time: str) -> int:
    """A time as SLURM writes it, in whole minutes, rounded up. Raises BadInput."""
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, days if dash else "0"]) or len(parts) > 3:
        raise BadInput(f"time: '{time}': written as SLURM does: '90' (minutes), '24:00:00' or '2-00:00:00'")
    numbers = [int(part) for part in parts]
    if dash:  # D-H, D-H:M, D-H:M:S
        hours, mins, seconds = numbers + [0] * (3 - len(numbers))
    elif len(numbers) == 3:  # H:M:S
        hours, mins, seconds = numbers
    else:  # M, M:S
        hours, (mins, seconds) = 0, numbers + [0] * (2 - len(numbers))
    return int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0)
