"""The agent: submitit starts one on each node; it runs torchrun there and reports how the attempt ended.

It replaces submitit's handling of signals. The agent passes a signal that announces an end to the workers, repeatedly
until they are gone, because a worker that is still importing PyTorch loses a signal. The workers save together and
exit. torchrun itself must not get the signal: it would kill the workers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass

from cluster import preflight, processes
from cluster.allocation import Allocation, current_allocation
from cluster.folder import ClusterFolder
from cluster.launch import Training, after_setup, torchrun
from cluster.logs import first_failure
from cluster.requeue import CRASHES, GivenUp, RequeuePermit
from sharebert_common.errors import REFUSAL_WAIT, BadInput, read_refusal
from sharebert_common.gpus import GPUS_PER_NODE
from sharebert_common.processes import StopSignals
from sharebert_common.run_files import ENDED, is_held

LOOK_S = 0.2
"""How often an agent looks at its command."""
FILES_S = 1.0
"""How often it reads the run's files, which may lie on a busy file system, and repeats a signal."""
SETTLE_S = 30.0
"""How long a file that a rank on another node wrote last may take to be seen on this node."""
SHARED_S = 90.0
"""How long a file that the first node wrote may take to be seen on another node."""


class Superseded(RuntimeError):
    """The job was requeued while this node was cut off: the run belongs to the newer attempt."""


class WorkersFailed(RuntimeError):
    """The workers failed; the message has the traceback of the first of them."""


@dataclass(frozen=True)
class Agent:
    """What submitit calls on each node."""

    training: Training

    def __call__(self) -> str:
        """Run one attempt on this node. Returns how it ended: "finished", or "stopped" and saved.

        Raises BadInput where something given is wrong, WorkersFailed where the workers failed, GivenUp where they
        failed too often, Superseded where a newer attempt has the run.
        """
        allocation, folder = current_allocation(self.training.recipe.port), ClusterFolder(self.training.run)
        permit = RequeuePermit(allocation.folder)
        if allocation.is_first and folder.stop_asked:  # while the job waited, or a requeue was on its way
            permit.forbid()
            folder.stop_before_begin(allocation.attempt)
            return "stopped"
        signals = StopSignals(on_first=permit.note_signal if allocation.is_first else None)
        signals.catch()  # to the end of the process: a late signal must not kill it before it has reported
        try:
            if allocation.is_first:
                self._begin(allocation, folder, permit)
            elif not _wait_for_begin(allocation, folder):
                return "stopped"
            if self.training.recipe.preflight:
                preflight.reach(allocation)
            environment = self._environment()
            if self.training.recipe.preflight:
                preflight.check(self.training, allocation, environment)
            code = self._run(allocation, folder, environment, signals)
        except BadInput as error:
            if permit.interrupted(error, signals):
                return "stopped"
            if not is_held(folder.run):  # the state of a run that trains elsewhere is not ours
                folder.fail(str(error))
            raise
        return _conclude(code, allocation, folder, permit)

    def _begin(self, allocation: Allocation, folder: ClusterFolder, permit: RequeuePermit) -> None:
        """Make this the current attempt, and give agents of an older one the time to see it."""
        older = folder.current
        folder.begin(allocation.attempt, job=allocation.job, restart=allocation.restart, nodes=allocation.nodes)
        if older:
            time.sleep(2 * FILES_S)  # agents on a node that was cut off may be alive: they end their workers now
        try:
            permit.allow(folder.checkpoint)
        except GivenUp as error:
            folder.fail(str(error))
            raise

    def _environment(self) -> dict[str, str]:
        """The environment of the workers."""
        given = {name: str(value) for name, value in self.training.recipe.env.items()}
        defaults = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        defaults[REFUSAL_WAIT] = str(5 * FILES_S)  # `_watch` sees a refusal before torchrun restarts the worker
        defaults["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = "[rank ${rank}] "
        # Workers that torchrun starts again in place would find the addresses of dead workers in a store that they
        # share with torchrun (torch 2.13), and wait for them for ever.
        defaults["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        if self.training.recipe.gpus_per_node:  # a worker that finds none would compute on the CPU without a word
            given[GPUS_PER_NODE] = str(self.training.recipe.gpus_per_node)
        return after_setup(self.training.recipe.setup, defaults | dict(os.environ) | given)

    def _run(
        self, allocation: Allocation, folder: ClusterFolder, environment: dict[str, str], signals: StopSignals
    ) -> int:
        """Run the workers to their end; torchrun's exit code."""
        command = processes.start(torchrun(self.training, allocation), environment)
        try:
            return _watch(command, allocation, folder, signals)
        finally:
            processes.end(command)


def _wait_for_begin(allocation: Allocation, folder: ClusterFolder) -> bool:
    """Wait until this node sees what the first one wrote. Returns whether the attempt begins. Raises BadInput.

    The first node alone decides that: nodes that look for a request to stop at different moments may see different
    things, and some would wait for the others in vain.
    """
    deadline = time.monotonic() + SHARED_S
    while folder.current != allocation.attempt:
        if folder.not_begun == allocation.attempt:
            return False
        if time.monotonic() > deadline:
            raise BadInput(
                f"{folder.run}: {allocation.name} does not see what {allocation.nodes[0]} wrote there within "
                f"{SHARED_S:.0f} s; the run directory must be on one file system that all nodes share"
            )
        time.sleep(LOOK_S)
    return True


def _watch(
    command: subprocess.Popen[bytes], allocation: Allocation, folder: ClusterFolder, signals: StopSignals
) -> int:
    """Wait for torchrun, and pass signals and requests to stop to its workers.

    Returns torchrun's exit code, or 1 where the run crashed too often. Raises Superseded, or BadInput where a worker
    refused something given.
    """
    looked = 0.0
    while (code := command.poll()) is None:
        time.sleep(LOOK_S)
        if time.monotonic() - looked < FILES_S:
            continue
        looked = time.monotonic()
        if folder.current not in (allocation.attempt, ""):
            raise Superseded(f"{allocation.attempt} on {allocation.name}: {folder.current} has the run now")
        if refusal := _refusal(allocation, folder):
            raise BadInput(refusal)
        if allocation.is_first and _crashed_too_often(folder):
            return 1
        if signals.received is not None:
            processes.relay(signals.received, command.pid)
        elif folder.stop_asked:
            processes.relay(signal.SIGTERM, command.pid)
    if refusal := _refusal(allocation, folder):
        raise BadInput(refusal)
    return code


def _refusal(allocation: Allocation, folder: ClusterFolder) -> str | None:
    """Why a worker of this node refused what it was given: torchrun would only start it again."""
    errors = (folder.workers / allocation.attempt / allocation.name).rglob("error.json")
    return next(filter(None, map(read_refusal, errors)), None)


def _conclude(code: int, allocation: Allocation, folder: ClusterFolder, permit: RequeuePermit) -> str:
    """How the attempt ended, from torchrun's exit code and the run's state.json. Raises WorkersFailed."""
    deadline = time.monotonic() + (SETTLE_S if code == 0 else 0)
    while (state := folder.state)["state"] not in ENDED and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    how = str(state["state"])
    if code == 0 and how in ENDED:
        asked = folder.stop_asked or state["reason"] == "file 'stop'"
        if how == "finished" or asked:
            permit.forbid()
        return how
    failure = first_failure(folder, allocation.attempt)
    if _crashed_too_often(folder):
        permit.forbid()
        failure = f"{CRASHES} crashes at one step; the last:\n{failure}"
    raise WorkersFailed(f"torchrun ended with exit code {code}, the run is {how or 'unknown'}\n{failure}")


def _crashed_too_often(folder: ClusterFolder) -> bool:
    """Whether the run crashed too often at the last step that it logged; its ranks count that in state.json."""
    state = folder.state
    if state["state"] != "failed":
        return False
    log = folder.log
    step = str(log[-1]["step"]) if log else "0"
    return int(state["crashes"].get(step, 0)) >= CRASHES
