"""The agent: submitit runs one on each node; it runs torchrun there and says, at the end, whether that was all.

It takes the place of submitit's handling of signals. A signal that announces an end goes on to the workers, again and
again until they are gone, because one that comes while they still import PyTorch is lost; they save together and
leave. torchrun itself must not see it: it would kill them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from cluster import preflight, processes
from cluster.allocation import Place, here
from cluster.folder import ClusterFolder
from cluster.launch import Training, after_setup, torchrun
from cluster.logs import first_failure
from cluster.processes import Signals
from cluster.requeue import CRASHES, Again, GivenUp
from sharebert_common.errors import BadInput

ENDED = ("finished", "stopped")
LOOK_S = 0.2
"""How often an agent looks at its command."""
FILES_S = 1.0
"""How often it looks at the run's files, which may lie on a busy file system, and repeats a signal."""
SETTLE_S = 30.0
"""How long what a rank on another node wrote last may take to be seen here."""
SHARED_S = 90.0
"""How long what one node wrote may take to be seen by another."""


class Superseded(RuntimeError):
    """The job was started again while this node was cut off: the run belongs to the new start."""


class Failed(RuntimeError):
    """The workers failed; the message has the traceback of the first of them."""


@dataclass(frozen=True)
class Agent:
    """What submitit calls on each node."""

    training: Training

    def __call__(self) -> str:
        """One start, on this node. Returns how it ended: "finished", or "stopped" and saved.

        Raises BadInput where something given is wrong, Failed where the workers failed, GivenUp where they did so
        too often, Superseded.
        """
        place, folder = here(self.training.recipe.port), ClusterFolder(self.training.run)
        again = Again(place.folder)
        with Signals() as signals:
            try:
                if place.is_first:
                    self._begin(place, folder, again)
                else:
                    _wait_for_begin(place, folder)
                if self.training.recipe.preflight:
                    preflight.reach(place)
                environment = self._environment()
                if self.training.recipe.preflight:
                    preflight.check(self.training, place, environment)
                code = self._run(place, folder, environment, signals)
            except BadInput as error:
                again.forbid()  # another start would find the same
                folder.fail(str(error))
                print(f"error: {error}", file=sys.stderr, flush=True)
                raise
            return _conclude(code, place, folder, again)

    def _begin(self, place: Place, folder: ClusterFolder, again: Again) -> None:
        """Make this the start that counts, and let older ones see it."""
        older = folder.current
        folder.begin(place.start, job=place.job, restart=place.restart, nodes=place.nodes)
        if older:
            time.sleep(2 * FILES_S)  # its agents may be alive on a node that was cut off: they end their workers now
        try:
            again.allow(folder.checkpoint)
        except GivenUp as error:
            folder.fail(str(error))
            raise

    def _environment(self) -> dict[str, str]:
        """The environment of the workers."""
        given = {name: str(value) for name, value in self.training.recipe.env.items()}
        defaults = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        defaults["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank ${rank}] "
        # Workers that are started again in place would find the addresses of the dead in a store that they share with
        # torchrun (torch 2.13), and wait for them without end.
        defaults["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        return after_setup(self.training.recipe.setup, defaults | dict(os.environ) | given)

    def _run(self, place: Place, folder: ClusterFolder, environment: dict[str, str], signals: Signals) -> int:
        """Run the workers to their end; torchrun's exit code."""
        command = processes.start(torchrun(self.training, place), environment)
        try:
            return _watch(command, place, folder, signals)
        finally:
            processes.end(command)


def _wait_for_begin(place: Place, folder: ClusterFolder) -> None:
    """Wait until this node sees what the first one wrote. Raises BadInput."""
    deadline = time.monotonic() + SHARED_S
    while folder.current != place.start:
        if time.monotonic() > deadline:
            raise BadInput(
                f"{folder.run}: {place.name} does not see what {place.nodes[0]} wrote there within {SHARED_S:.0f} s; "
                "the run directory must be one file system that all nodes share"
            )
        time.sleep(LOOK_S)


def _watch(command: subprocess.Popen[bytes], place: Place, folder: ClusterFolder, signals: Signals) -> int:
    """Wait for a command, and pass on what it should know; its exit code, 1 for a run given up. Raises Superseded."""
    looked = 0.0
    while (code := command.poll()) is None:
        time.sleep(LOOK_S)
        if time.monotonic() - looked < FILES_S:
            continue
        looked = time.monotonic()
        if folder.current not in (place.start, ""):
            raise Superseded(f"{place.start} on {place.name}: {folder.current} has the run now")
        if place.is_first and _given_up(folder):
            return 1
        if signals.received is not None:
            processes.relay(signals.received, command.pid)
        elif folder.stop_asked:
            processes.relay(signal.SIGTERM, command.pid)
    return code


def _conclude(code: int, place: Place, folder: ClusterFolder, again: Again) -> str:
    """What the end of the workers means, from the run's state.json."""
    deadline = time.monotonic() + (SETTLE_S if code == 0 else 0)
    while (how := str(folder.state.get("state", "unknown"))) not in ENDED and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    if code == 0 and how in ENDED:
        asked = folder.stop_asked or folder.state.get("reason") == "file 'stop'"
        if how == "finished" or asked:
            again.forbid()
        return how
    failure = first_failure(folder, place.start)
    if _given_up(folder):
        again.forbid()
        failure = f"{CRASHES} crashes at one step; the last:\n{failure}"
    raise Failed(f"torchrun ended with exit code {code}, the run is {how}\n{failure}")


def _given_up(folder: ClusterFolder) -> bool:
    """Whether the run crashed too often at the last step that it logged; its ranks count that in state.json."""
    state = folder.state
    if state.get("state") != "failed":
        return False
    log = folder.log
    step = str(log[-1]["step"]) if log else "0"
    return int(state.get("crashes", {}).get(step, 0)) >= CRASHES
