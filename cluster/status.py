"""`sharebert status` and `sharebert stop`: how runs stand, from the scheduler and from their own files."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import scheduler
from cluster.folder import ClusterFolder, known_runs
from sharebert_common.errors import BadInput

OVER = ("finished", "failed", "stopped")
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Status:
    """How a run stands."""

    run: Path
    job: str
    """Id of the newest job, and its state in the scheduler."""
    state: str
    """running, queued, stopped, finished or failed; unknown where SLURM does not answer."""
    reason: str
    nodes: str
    attempts: int
    step: int
    steps: int
    loss: float | None
    tokens_per_s: float | None
    goodput: float | None
    """Time of the steps that count, divided by all time since the first submission."""
    left_s: float | None
    """Seconds to the last step at the current speed."""

    def line(self) -> str:
        """One line, for a list of runs."""
        progress = f"{self.step}/{self.steps or '?'}"
        return f"{self.state:9} {progress:>15}  job {self.job:28} {self._speed()}  {self.run}"

    def text(self) -> str:
        """All facts, one a line."""
        rows = {
            "run": self.run,
            "state": f"{self.state}{f' ({self.reason})' if self.reason else ''}",
            "job": self.job,
            "nodes": self.nodes or "none",
            "attempts": self.attempts,
            "step": f"{self.step} of {self.steps or '?'}",
            "loss": "none yet" if self.loss is None else f"{self.loss:.4f}",
            "tokens/s": "none yet" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f}",
            "goodput": "none yet" if self.goodput is None else f"{self.goodput:.1%}",
            "time left": "unknown" if self.left_s is None else _duration(self.left_s),
        }
        return "\n".join(f"{name:9} {value}" for name, value in rows.items())

    def _speed(self) -> str:
        loss = "" if self.loss is None else f"loss {self.loss:.4f}"
        goodput = "" if self.goodput is None else f"goodput {self.goodput:.0%}"
        return f"{loss:12} {goodput:12}"


def status(run: Path) -> Status:
    """How a run stands. Raises BadInput where it was not submitted."""
    folder = ClusterFolder(run)
    submissions = folder.submissions
    if not submissions:
        raise BadInput(f"{run}: was not submitted with `sharebert submit` ({folder.path} has no submissions)")
    newest, state = submissions[-1], folder.state
    lines = [line for line in folder.log if "loss" in line]
    last: dict[str, Any] = lines[-1] if lines else {}
    facts = scheduler.job_facts(newest["job"], newest["launcher"])
    in_queue = facts["JobState"]
    how = _state(str(state["state"]), in_queue, submitted=newest["time"], updated=state["updated"])
    step = max(int(state["step"]), int(last.get("step", 0)))
    steps = int(state["steps"])
    nodes = facts.get("NodeList", "")
    return Status(
        run=folder.run,
        job=f"{newest['job']} ({in_queue.lower()})",
        state=how,
        reason={"stopped": state["reason"], "failed": state["reason"], UNKNOWN: "SLURM does not answer"}.get(how, ""),
        nodes="" if nodes == "(null)" else nodes,
        attempts=len(folder.attempts),
        step=step,
        steps=steps,
        loss=last.get("loss"),
        tokens_per_s=last.get("tokens_per_s"),
        goodput=goodput(lines, submissions[0]["time"], state["updated"] if how in OVER else time.time()),
        left_s=(steps - step) * last["step_s"] if last and how not in (*OVER, UNKNOWN) else None,
    )


def goodput(lines: list[dict[str, Any]], began: float, ended: float) -> float | None:
    """Time of the steps in a log, divided by the time from `began` to `ended`.

    A log holds each step once, so time in the queue, at the start, in saves and validation, and in steps that were
    made again lowers the result. `lines` are those of log.jsonl that have a loss; `step_s` is the mean since the line
    before.
    """
    if not lines or ended <= began:
        return None
    before = [0, *(int(line["step"]) for line in lines)]
    useful = sum((int(line["step"]) - step) * line["step_s"] for step, line in zip(before, lines, strict=False))
    return min(1.0, useful / (ended - began))


def all_runs() -> str:
    """A line for each run that this user submitted."""
    return "\n".join(map(_line, known_runs())) or "no run was submitted yet"


def _line(run: Path) -> str:
    """A run's line; one whose folder was emptied or cannot be read must not hide the others."""
    try:
        return status(run).line()
    except (BadInput, OSError) as error:
        return f"unknown    {error}"


def stop(run: Path) -> str:
    """Ask a run to save and end, without a requeue. Returns what will happen. Raises BadInput where no job is alive."""
    folder = ClusterFolder(run)
    if not folder.submissions:
        raise BadInput(
            f"{run}: was not submitted with `sharebert submit`; a file named `stop` in its directory stops a run"
        )
    newest = folder.submissions[-1]
    state = scheduler.state_of(newest["job"], newest["launcher"])
    if state not in scheduler.ALIVE:
        raise BadInput(f"{run}: job {newest['job']} is over ({state.lower()})")
    folder.ask_for_stop()  # first: a job that begins before it is cancelled finds the request
    if state == "PENDING":
        scheduler.cancel(newest["job"])
        return f"{run}: job {newest['job']} was taken out of the queue"
    if state == scheduler.UNKNOWN:
        return f"{run}: SLURM does not answer; job {newest['job']}, where it is not over, will save and end"
    return f"{run}: job {newest['job']} will save and end; `sharebert submit` resumes from there"


def _state(state: str, in_queue: str, *, submitted: float, updated: float) -> str:
    """The run's state in one word: the one that it wrote, or, where that is older than the job, the job's."""
    if state in OVER and updated > submitted and in_queue not in ("PENDING", "RUNNING", "CONFIGURING"):
        return state
    if in_queue in ("PENDING", "CONFIGURING", "REQUEUED"):
        return "queued"
    if in_queue == scheduler.UNKNOWN:
        return UNKNOWN
    if in_queue in scheduler.ALIVE:
        return state if state == "finished" else "running"
    if in_queue == "CANCELLED":
        return "stopped"
    return "failed" if state in ("running", "") or updated < submitted else state


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
