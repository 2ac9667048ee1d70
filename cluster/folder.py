"""What the cluster keeps of a run, beside the run's own files.

RUN/cluster/train.yaml        the recipe as it was submitted: later edits do not reach a run that requeues itself
RUN/cluster/submissions.jsonl one line a submission: job, launcher, time, nodes
RUN/cluster/starts.jsonl      one line an attempt: its name (`start`), job, restart, nodes, time
RUN/cluster/current           name of the newest attempt; agents of an older one end when they see it
RUN/cluster/not_begun         name of the newest attempt that did not begin, because a stop was asked for before
RUN/cluster/stop              a user asked the run to save and end
RUN/cluster/jobs/ID/          submitit's files and the log of each node
RUN/cluster/workers/ATTEMPT/  what each worker wrote
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sharebert_common import run_files
from sharebert_common.errors import BadInput
from sharebert_common.files import write_atomically
from sharebert_common.run_files import append_json_line, read_json_lines


class ClusterFolder:
    """The cluster's files of one run, and the run's files that the cluster reads."""

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run).absolute()
        self.path = self.run / "cluster"
        self.recipe = self.path / "train.yaml"
        self.jobs = self.path / "jobs"
        self.workers = self.path / "workers"
        self._submissions = self.path / "submissions.jsonl"
        self._attempts = self.path / "starts.jsonl"
        self._current = self.path / "current"
        self._not_begun = self.path / "not_begun"
        self._stop = self.path / "stop"

    @contextmanager
    def prepared(self, recipe_yaml: str) -> Iterator[None]:
        """Prepare a submission: keep its recipe, and drop an old request to stop.

        Where the block raises BadInput, the submission was refused, and both are as they were before. Raises BadInput
        itself where the folder cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            before = self.recipe.read_text(encoding="utf-8") if self.recipe.exists() else None
            stop_asked = self.stop_asked
            self._stop.unlink(missing_ok=True)
            write_atomically(self.recipe, recipe_yaml)
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be written to ({error.strerror})") from error
        try:
            yield
        except BadInput:
            if stop_asked:
                self.ask_for_stop()
            if before is None:
                self.recipe.unlink()
            else:
                write_atomically(self.recipe, before)
            raise

    def add_submission(self, **facts: Any) -> None:
        """Record a submission."""
        append_json_line(self._submissions, facts | {"time": time.time()})

    @property
    def submissions(self) -> list[dict[str, Any]]:
        """All submissions, oldest first."""
        return read_json_lines(self._submissions)

    def begin(self, attempt: str, **facts: Any) -> None:
        """Record an attempt, and make it the current one."""
        append_json_line(self._attempts, {"start": attempt, **facts, "time": time.time()})
        write_atomically(self._current, attempt)

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """All attempts, oldest first; `start` is the attempt's name."""
        return read_json_lines(self._attempts)

    @property
    def current(self) -> str:
        """Name of the newest attempt; empty before the first."""
        try:
            return self._current.read_text(encoding="utf-8")
        except OSError:
            return ""

    @property
    def not_begun(self) -> str:
        """Name of the newest attempt that did not begin, because a stop was asked for before; empty without one."""
        try:
            return self._not_begun.read_text(encoding="utf-8")
        except OSError:
            return ""

    def ask_for_stop(self) -> None:
        """Ask the run to save and end, without a requeue."""
        self._stop.touch()

    @property
    def stop_asked(self) -> bool:
        """Whether a user asked the run to save and end."""
        return self._stop.exists()

    @property
    def state(self) -> dict[str, Any]:
        """The run's state.json, with the defaults of a run that was never started."""
        return run_files.peek_state(self.run)

    def fail(self, reason: str) -> None:
        """Write to the run's state.json that the run has failed, and why. One that is not JSON stays as it is."""
        with suppress(BadInput):
            first = {} if self.state["state"] else {"step": self.checkpoint}
            run_files.write_state(self.run, "failed", reason=reason, **first)

    def stop_before_begin(self, attempt: str) -> None:
        """Let this attempt not begin: tell the other nodes, and state.json, where a run that ended stays as it is."""
        write_atomically(self._not_begun, attempt)
        with suppress(BadInput):
            if self.state["state"] not in run_files.ENDED:
                reason = "asked before the attempt began"
                run_files.write_state(self.run, "stopped", reason=reason, step=self.checkpoint)

    @property
    def checkpoint(self) -> int:
        """Step of the newest checkpoint; 0 before the first."""
        whole = (self.run / "checkpoints").glob("step-*/manifest.json")
        return max((int(file.parent.name.removeprefix("step-")) for file in whole), default=0)

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of the run's log.jsonl."""
        return run_files.read_log(self.run)


def remember(run: Path) -> None:
    """Add a run to the user's list for `sharebert status`; print a line where their home cannot be written to."""
    folder = _known()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / hashlib.sha256(str(run).encode()).hexdigest()[:16], str(run))
    except OSError as error:
        print(f"{folder}: {error.strerror}; `sharebert status` will not list this run", file=sys.stderr)


def known_runs() -> list[Path]:
    """The runs that this user submitted and that still exist."""
    files = [file for file in _known().glob("*") if not file.name.startswith(".")]
    runs = [Path(file.read_text(encoding="utf-8")) for file in sorted(files, key=lambda file: file.stat().st_mtime)]
    return [run for run in runs if run.is_dir()]


def _known() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "sharebert" / "runs"
