"""What a job runs, and the torchrun command that runs it on a node."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cluster.allocation import Allocation
from cluster.processes import prepare_child
from cluster.recipe import ClusterRecipe
from sharebert_common.errors import BadInput


@dataclass(frozen=True)
class Training:
    """A run, and the module that each of its processes runs."""

    run: Path
    """Directory of the run."""
    module: tuple[str, ...]
    """The module that a worker runs, with its arguments."""
    datasets: tuple[Path, ...]
    """The datasets that it reads; they must be the same on every node."""
    recipe: ClusterRecipe
    """Where it runs, and on how much."""


def torchrun(training: Training, allocation: Allocation) -> list[str]:
    """The command that runs the workers of one node."""
    return elastic(
        training.recipe,
        allocation,
        list(training.module),
        port=allocation.port,
        max_restarts=training.recipe.max_restarts,
        logs=training.run / "cluster" / "workers" / allocation.attempt / allocation.name,
    )


def elastic(
    recipe: ClusterRecipe,
    allocation: Allocation,
    module: list[str],
    *,
    port: int,
    max_restarts: int,
    logs: Path | None = None,
) -> list[str]:
    """A torchrun command for one node. It names the host of the rendezvous: torchrun may guess it wrong from names."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(allocation.nodes)}",
        f"--nproc-per-node={recipe.processes}",
        f"--max-restarts={max_restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={allocation.nodes[0]}:{port}",
        f"--rdzv-id={allocation.attempt}",
        f"--rdzv-conf=is_host={int(allocation.is_first)}",
        f"--local-addr={allocation.name}",
        "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT",  # the workers handle the others
    ]
    if logs is not None:
        command += [f"--log-dir={logs}", "--tee=3", "--local-ranks-filter=0"]
    return [*command, "-m", *module]


def after_setup(lines: list[str], environment: dict[str, str]) -> dict[str, str]:
    """Run the lines of a recipe's `setup` on this node; the environment after them. Raises BadInput where one fails.

    They run to their end although a stop signal comes: the workers get it afterwards, and save.
    """
    if not lines:
        return environment
    show = f"exec {shlex.quote(sys.executable)} -c 'import json, os; print(json.dumps(dict(os.environ)))' >&3"
    script = "\n".join(["set -e", "exec 3>&1 >&2", *lines, show])
    with tempfile.TemporaryFile() as answer:  # no pipe: a process that a line leaves behind would keep it open
        done = subprocess.run(
            ["bash", "-c", script],
            env=environment,
            stdout=answer,
            stdin=subprocess.DEVNULL,
            preexec_fn=prepare_child,
            check=False,
        )
        answer.seek(0)
        found = answer.read()
    if done.returncode:
        raise BadInput(f"setup: exit code {done.returncode}; see its output above")
    if not found:
        raise BadInput("setup: a line ended the shell, with `exit 0` or `exec`; let all lines come to their end")
    return dict(json.loads(found))
