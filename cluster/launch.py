"""What a job runs, and the torchrun line that runs it on a node."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.allocation import Place
from cluster.recipe import ClusterRecipe
from sharebert_common.errors import BadInput


@dataclass(frozen=True)
class Training:
    """A run, as a command of many processes."""

    run: Path
    """Directory of the run."""
    module: tuple[str, ...]
    """The module that a worker runs, with its arguments."""
    datasets: tuple[Path, ...]
    """What it reads: must be the same on every node."""
    recipe: ClusterRecipe
    """Where it runs."""


def torchrun(training: Training, place: Place) -> list[str]:
    """The command that runs the workers of one node."""
    return elastic(
        training.recipe,
        place,
        list(training.module),
        port=place.port,
        max_restarts=training.recipe.max_restarts,
        logs=training.run / "cluster" / "workers" / place.start / place.name,
    )


def elastic(
    recipe: ClusterRecipe, place: Place, module: list[str], *, port: int, max_restarts: int, logs: Path | None = None
) -> list[str]:
    """A torchrun command for one node. Who hosts the rendezvous is said, not guessed from names and addresses."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(place.nodes)}",
        f"--nproc-per-node={recipe.processes}",
        f"--max-restarts={max_restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={place.nodes[0]}:{port}",
        f"--rdzv-id={place.start}",
        f"--rdzv-conf=is_host={int(place.is_first)}",
        f"--local-addr={place.name}",
        "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT",  # the others are the workers' business
    ]
    if logs is not None:
        command += [f"--log-dir={logs}", "--tee=3", "--local-ranks-filter=0"]
    return [*command, "-m", *module]


def after_setup(lines: list[str], environment: dict[str, str]) -> dict[str, str]:
    """Run a recipe's `setup` on this node; the environment that it leaves. Raises BadInput where a line fails."""
    if not lines:
        return environment
    show = f"exec {sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))' >&3"
    script = "\n".join(["set -e", "exec 3>&1 >&2", *lines, show])
    done = subprocess.run(
        ["bash", "-c", script], env=environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise BadInput(f"setup: exit code {done.returncode}; its output stands above")
    return dict(json.loads(done.stdout))
