"""The files that a run tells others about itself with: `state.json` and `log.jsonl`. Read and written here alone.

The training, the agents of a cluster, `sharebert status` and the benchmarks all use these functions.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from sharebert_common.errors import BadInput
from sharebert_common.files import write_atomically

STATE_FILE = "state.json"
LOG_FILE = "log.jsonl"
EVENTS_FILE = "events.jsonl"
"""What happened to a run: `time`, `step` and `text` a line."""
LOCK_FILE = ".lock"
"""An attempt locks this file while it lives."""

ENDED = ("finished", "stopped")
"""States of a run that ended well: all steps are made, or a stop was asked for and the state saved."""


def _unstarted() -> dict[str, Any]:
    """The state of a run that was never started."""
    return {
        "state": "",
        "reason": "",
        "step": 0,
        "steps": 0,
        "updated": 0.0,
        "restarts": 0,
        "crashes": {},
        "job": None,
    }


def read_state(run: Path) -> dict[str, Any]:
    """The content of `state.json`, with a default for each key that is missing. `state` is "" before the first start.

    Raises BadInput where the file is not JSON, OSError where it cannot be read.
    """
    path = run / STATE_FILE
    try:
        return _unstarted() | dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return _unstarted()
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: not JSON ({error}); remove it, the checkpoints hold all that the run needs") from error


def peek_state(run: Path) -> dict[str, Any]:
    """Like `read_state`, for those who only watch: a file that cannot be read now counts as missing."""
    try:
        return read_state(run)
    except (BadInput, OSError):
        return _unstarted()


def write_state(run: Path, state: str, *, reason: str = "", **changes: Any) -> None:
    """Say in `state.json` how the run stands; a key that is not given keeps its value.

    Raises BadInput where the file that is there is not JSON, OSError where the disk does not take it.
    """
    content = read_state(run) | changes | {"state": state, "reason": reason, "updated": time.time()}
    write_atomically(run / STATE_FILE, json.dumps(content, indent=1) + "\n")


def is_held(run: Path) -> bool:
    """Whether a living attempt holds the lock of a run, on this node or, where the file system can tell, another."""
    try:
        with (run / LOCK_FILE).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


def read_log(run: Path) -> list[dict[str, Any]]:
    """The whole lines of `log.jsonl`; none where there is no such file."""
    return read_json_lines(run / LOG_FILE)


def last_logged_step(run: Path) -> int:
    """The newest step in `log.jsonl`; 0 where there is none."""
    return next((int(line["step"]) for line in reversed(read_log(run)) if "step" in line), 0)


def cut_log(run: Path, step: int) -> None:
    """Drop the lines of `log.jsonl` after `step`: a run that resumes there writes them again.

    With step 0 the line of step 0 goes as well: a run that starts from nothing validates at step 0 once more.
    """
    path, kept, last = run / LOG_FILE, 0, step or -1
    try:
        for line in path.read_bytes().splitlines(keepends=True):
            if not json.loads(line)["step"] <= last or not line.endswith(b"\n"):
                break
            kept += len(line)
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        pass  # the last line of a killed run may be half a line
    os.truncate(path, kept)


class LogWriter:
    """Appends to `log.jsonl`. A line is in the file whole or not at all; lines wait while the disk is full."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[dict[str, Any]] = []
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self) -> None:
        """Write the lines that wait. Raises OSError where the disk does not take them."""
        while self.waiting:
            line = (json.dumps(self.waiting[0]) + "\n").encode()
            size = os.fstat(self._handle).st_size
            if os.write(self._handle, line) < len(line):
                os.ftruncate(self._handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            del self.waiting[0]

    def sync(self) -> None:
        """Make durable what was written. Raises OSError."""
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append one object to a file of JSON lines, which is made where it is missing.

    Half a line at its end, which a crash or a full disk has left, gets an end first; glued to it, both were lost.
    Raises OSError where the disk does not take it.
    """
    line = json.dumps(value).encode() + b"\n"
    with path.open("a+b") as out:
        if out.seek(0, os.SEEK_END):
            out.seek(-1, os.SEEK_END)
            if out.read(1) != b"\n":
                line = b"\n" + line
        out.write(line)  # at the end, wherever the file was read


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where it cannot be read. A line that is being written is left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    lines = []
    for line in text.split("\n"):
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return lines
