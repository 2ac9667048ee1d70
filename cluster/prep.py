"""A task of `sharebert prep` in a SLURM array: a command that may be stopped at any time, and started again."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass

from cluster import processes
from cluster.allocation import here
from cluster.launch import after_setup
from cluster.recipe import ClusterRecipe
from cluster.requeue import Again
from sharebert_common.errors import BadInput

LOOK_S = 0.2
BAD_INPUT = 2


@dataclass(frozen=True)
class PrepTask:
    """What submitit calls."""

    command: tuple[str, ...]
    recipe: ClusterRecipe

    def __call__(self) -> str:
        """Do the task: "finished", or "stopped", to be started again. What is done by then is kept.

        Raises BadInput where the input or the config is wrong, RuntimeError where the command failed.
        """
        again = Again(here(self.recipe.port).folder)
        again.allow(step=0)
        with processes.Signals() as signals:
            environment = dict(os.environ) | {name: str(value) for name, value in self.recipe.env.items()}
            command = processes.start(self.command, after_setup(self.recipe.setup, environment))
            try:
                while (code := command.poll()) is None and signals.received is None:
                    time.sleep(LOOK_S)
            finally:
                processes.end(command)
        if code is None:
            print(f"stopped by {signal.Signals(signals.received or 0).name}", file=sys.stderr, flush=True)
            return "stopped"
        if code in (0, BAD_INPUT):
            again.forbid()
        if code == BAD_INPUT:
            raise BadInput("sharebert prep refused its input; its line stands above")
        if code:
            raise RuntimeError(f"sharebert prep ended with exit code {code}")
        return "finished"
