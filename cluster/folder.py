"""What the cluster keeps of a run, beside the run's own files.

RUN/cluster/train.yaml        the recipe as it was submitted: edits afterwards do not reach a run that requeues
RUN/cluster/submissions.jsonl one line a submission: job, launcher, time, nodes
RUN/cluster/starts.jsonl      one line a start of the job: job, restart, nodes, time
RUN/cluster/current           the newest start; agents of an older one end when they see it
RUN/cluster/stop              a user asked for the end
RUN/cluster/jobs/ID/          submitit's files and the log of each node
RUN/cluster/workers/START/    what each worker wrote
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from sharebert_common.errors import BadInput
from sharebert_common.files import write_atomically


class ClusterFolder:
    """The cluster's files of one run, and the run's files that it reads."""

    def __init__(self, run: str | Path) -> None:
        self.run = Path(run).absolute()
        self.path = self.run / "cluster"
        self.recipe = self.path / "train.yaml"
        self.jobs = self.path / "jobs"
        self.workers = self.path / "workers"
        self._current = self.path / "current"
        self._stop = self.path / "stop"

    def prepare(self, recipe_yaml: str) -> None:
        """Get ready for a submission; an older wish to stop is over. Raises BadInput where that is not possible."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._stop.unlink(missing_ok=True)
            write_atomically(self.recipe, recipe_yaml)
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be written to ({error.strerror})") from error

    def submitted(self, **facts: Any) -> None:
        """Remember a submission."""
        _append(self.path / "submissions.jsonl", facts | {"time": time.time()})

    @property
    def submissions(self) -> list[dict[str, Any]]:
        """All submissions, oldest first."""
        return _lines(self.path / "submissions.jsonl")

    def begin(self, start: str, **facts: Any) -> None:
        """Make `start` the one that counts."""
        _append(self.path / "starts.jsonl", {"start": start, **facts, "time": time.time()})
        write_atomically(self._current, start)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """All starts, oldest first."""
        return _lines(self.path / "starts.jsonl")

    @property
    def current(self) -> str:
        """The newest start; empty before the first."""
        try:
            return self._current.read_text(encoding="utf-8")
        except OSError:
            return ""

    def ask_for_stop(self) -> None:
        """Ask for a save and the end, for good."""
        self._stop.touch()

    @property
    def stop_asked(self) -> bool:
        """Whether a user asked for the end."""
        return self._stop.exists()

    @property
    def state(self) -> dict[str, Any]:
        """The run's state.json; empty before its first start."""
        try:
            return dict(json.loads((self.run / "state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def fail(self, reason: str) -> None:
        """Say in the run's state.json that it does not go on by itself."""
        state = {"step": self.checkpoint, "restarts": 0, "crashes": {}, "job": None} | self.state
        state |= {"state": "failed", "reason": reason, "updated": time.time()}
        write_atomically(self.run / "state.json", json.dumps(state, indent=1) + "\n")

    @property
    def checkpoint(self) -> int:
        """Step of the newest checkpoint; 0 before the first."""
        whole = (self.run / "checkpoints").glob("step-*/manifest.json")
        return max((int(file.parent.name.removeprefix("step-")) for file in whole), default=0)

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of the run's log.jsonl."""
        return _lines(self.run / "log.jsonl")


def remember(run: Path) -> None:
    """Add a run to those that `sharebert status` lists for this user, where their home can be written to."""
    folder = _known()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / hashlib.sha256(str(run).encode()).hexdigest()[:16], str(run))
    except OSError as error:
        print(f"{folder}: {error.strerror}; `sharebert status` will not list this run", file=sys.stderr)


def known_runs() -> list[Path]:
    """The runs that this user submitted and that are still there."""
    files = [file for file in _known().glob("*") if not file.name.startswith(".")]
    runs = [Path(file.read_text(encoding="utf-8")) for file in sorted(files, key=lambda file: file.stat().st_mtime)]
    return [run for run in runs if run.is_dir()]


def _known() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "sharebert" / "runs"


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; one that is being written is left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(dict(json.loads(line)))
        except ValueError:
            continue
    return lines
