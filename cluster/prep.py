"""A task of `sharebert prep` in a SLURM array: a command that may be stopped at any time and resumes."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass

from cluster import processes
from cluster.allocation import current_allocation
from cluster.launch import after_setup
from cluster.recipe import ClusterRecipe
from cluster.requeue import RequeuePermit
from sharebert_common.errors import BAD_INPUT, BadInput
from sharebert_common.processes import StopSignals

LOOK_S = 0.2


@dataclass(frozen=True)
class PrepTask:
    """What submitit calls."""

    arguments: tuple[str, ...]
    """Of `sharebert prep`."""
    recipe: ClusterRecipe

    def __call__(self) -> str:
        """Run the command: "finished", or "stopped" and to be requeued. The parts that are complete are kept.

        Raises BadInput where the input or the recipe is wrong, RuntimeError where the command failed.
        """
        permit = RequeuePermit(current_allocation(self.recipe.port).folder)
        permit.allow(step=0)
        signals = StopSignals(on_first=permit.note_signal)
        signals.catch()
        try:
            return self._run(permit, signals)
        except BadInput as error:
            if permit.interrupted(error, signals):
                return "stopped"
            raise

    def _run(self, permit: RequeuePermit, signals: StopSignals) -> str:
        """Run the command to its end, or to the first signal."""
        environment = dict(os.environ) | {name: str(value) for name, value in self.recipe.env.items()}
        prep = (sys.executable, "-m", "sharebert_cli", "prep", *self.arguments)  # Python of the node, or of the image
        command = processes.start(prep, after_setup(self.recipe.setup, environment))
        try:
            while (code := command.poll()) is None and signals.received is None:
                time.sleep(LOOK_S)
        finally:
            processes.end(command)
        if code is None:
            print(f"stopped by {signal.Signals(signals.received or 0).name}", file=sys.stderr, flush=True)
            return "stopped"
        if code == BAD_INPUT:
            raise BadInput("sharebert prep refused its input; see the line above")
        if code:
            raise RuntimeError(f"sharebert prep ended with exit code {code}")
        permit.forbid()
        return "finished"
