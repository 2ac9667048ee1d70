"""The run directory: where its files are, who may use it, and the state that rank 0 writes.

RUN/config.yaml  RUN/tokenizer.json  RUN/environment.json  RUN/state.json  RUN/log.jsonl
RUN/tensorboard/  RUN/checkpoints/  RUN/heartbeats/  RUN/bad_rows.jsonl
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from sharebert_common import run_files
from sharebert_common.errors import BadInput
from sharebert_common.files import mkdir_durably, remove_unfinished, write_atomically
from sharebert_common.processes import starter

T = TypeVar("T")

ORPHAN_S = 300.0
"""How long an attempt waits for an earlier one that will end by itself: its ranks may save first."""

OUTAGE_S = 60.0
"""How long the first read and the last write of `state.json` are tried again where the file system fails."""

PROGRESS_S = 10.0
"""Seconds between updates of `state.json` while a run makes steps."""


class RunFolder:
    """The files of one run. Every rank may read them; only rank 0 calls the functions that write."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None
        self._noted = 0.0

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """What each attempt ran on."""
        return self.path / "environment.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the dataset."""
        return self.path / "tokenizer.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def log(self) -> Path:
        """One JSON object for each logging interval."""
        return self.path / run_files.LOG_FILE

    @property
    def bad_rows(self) -> Path:
        """Rows that the run skips, since steps on them failed."""
        return self.path / "bad_rows.jsonl"

    @property
    def heartbeats(self) -> Path:
        """Folder in which each rank notes its progress."""
        return self.path / "heartbeats"

    @property
    def stop_file(self) -> Path:
        """A file of this name asks for a stop."""
        return self.path / "stop"

    def occupy(self) -> None:
        """Make the folder and take its lock, which the operating system releases when this process dies.

        Waits for an attempt whose launcher was killed, and for an older one of the same job. Raises BadInput where the
        folder cannot be made, or another attempt of the run is alive.
        """
        try:
            mkdir_durably(self.path)
            lock = (self.path / run_files.LOCK_FILE).open("a+", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"{self.path}: not usable as a run directory ({error.strerror})") from error
        deadline, probed_until = time.monotonic() + ORPHAN_S, time.monotonic() + 0.5
        while not self._locked(lock):
            lock.seek(0)
            holder = lock.read().strip()
            if time.monotonic() < probed_until:  # `is_held` takes the lock for a moment
                time.sleep(0.05)
                continue
            if not _ends_soon(holder) or time.monotonic() > deadline:
                lock.close()
                raise BadInput(f"{self.path}: in use by another attempt of this run ({holder})")
            time.sleep(0.2)
        lock.truncate(0)
        job = f", job {os.environ['SLURM_JOB_ID']} requeued {_requeues()}" if "SLURM_JOB_ID" in os.environ else ""
        started_by = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else starter()
        launcher = "" if started_by is None else f", launcher {started_by}"
        lock.write(f"pid {os.getpid()} on {platform.node()}{job}{launcher}")
        lock.flush()
        self._lock = lock

    def _locked(self, lock: IO[str]) -> bool:
        """Whether this process has the lock; also, with a warning, where the file system has no locks."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            self.say(
                f"no locks on this file system ({error.strerror}): a second attempt beside this one goes unnoticed"
            )
        return True

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def say(self, text: str) -> None:
        """Print a line to the terminal or the job's log; nothing where that is not possible."""
        with suppress(OSError):
            print(f"{self.path}: {text}", file=sys.stderr, flush=True)

    def read_state(self) -> dict[str, Any]:
        """The content of `state.json`, see `run_files.read_state`."""
        return run_files.read_state(self.path)

    def write_state(self, state: str, *, reason: str = "", **changes: Any) -> None:
        """Say in `state.json` how the run stands; a key that is not given keeps its value."""
        self._noted = time.monotonic()
        with self._or_say(self.path / run_files.STATE_FILE):
            run_files.write_state(self.path, state, reason=reason, **changes)

    def end(self, state: str, *, reason: str = "", **changes: Any) -> None:
        """The last `write_state` of an attempt, tried again for OUTAGE_S: nobody should wait for a dead run."""
        with self._or_say(self.path / run_files.STATE_FILE):
            patiently(lambda: run_files.write_state(self.path, state, reason=reason, **changes))

    def start(self, *, step: int, steps: int, tokenizer: Path, recipe_yaml: str, environment: dict[str, Any]) -> None:
        """Record an attempt that resumes from `step`, and drop an old request to stop. A full disk is no error."""
        patiently(self._drop_old_stop_request)
        for path in (self.tokenizer, self.config, self.environment, self.bad_rows, self.path / run_files.STATE_FILE):
            remove_unfinished(path)
        with self._or_say(self.tokenizer):
            write_atomically(self.tokenizer, tokenizer.read_bytes())  # bit for bit: its checksum is compared
        with self._or_say(self.config):
            write_atomically(self.config, recipe_yaml)
        with self._or_say(self.environment):
            write_atomically(
                self.environment, json.dumps([*self._earlier_environments(), environment], indent=1) + "\n"
            )
        before = patiently(self.read_state)
        crashes = before["crashes"]
        if before["state"] == "running":  # that attempt died without a word
            crashes = patiently(lambda: self._counted(before["crashes"]))
        self.cut_log(step)
        restarts = before["restarts"] + 1 if before["state"] else 0
        job = os.environ.get("SLURM_JOB_ID")
        about = {"steps": steps, "resumed_from": step, "restarts": restarts, "crashes": crashes, "job": job}
        self.write_state("running", step=step, **about)

    def _drop_old_stop_request(self) -> None:
        """Remove a stop file that is older than the end of the attempt that it stopped; a newer one stops this attempt.

        The ages are compared by the clock of the file system, on which both files lie.
        """
        with suppress(FileNotFoundError):
            asked = self.stop_file.stat().st_mtime_ns
            ended = self.read_state()["state"] in run_files.ENDED
            if ended and asked <= (self.path / run_files.STATE_FILE).stat().st_mtime_ns:
                self.stop_file.unlink()

    @contextmanager
    def _or_say(self, path: Path) -> Iterator[None]:
        """Print that `path` could not be written, instead of raising."""
        try:
            yield
        except OSError as error:
            self.say(f"{path.name} could not be written ({error.strerror})")
        except BadInput as error:  # what was there is not what this program wrote
            self.say(str(error))

    def _earlier_environments(self) -> list[dict[str, Any]]:
        """The entries of earlier attempts in `environment.json`."""
        try:
            return list(json.loads(self.environment.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return []

    def note_progress(self, step: int) -> None:
        """Write `step` to `state.json`, unless that was written less than PROGRESS_S ago."""
        if time.monotonic() - self._noted > PROGRESS_S:
            self.write_state("running", step=step)

    def fail(self, reason: str, *, crash: bool) -> None:
        """Record that this attempt failed: in a crash, or because something given is wrong.

        Without the lock this does nothing: the run belongs to another attempt.
        """
        if self._lock is not None:
            with self._or_say(self.path / run_files.STATE_FILE):
                crashes = run_files.peek_state(self.path)["crashes"]
                counted = patiently(lambda: self._counted(crashes)) if crash else crashes
                self.end("failed", reason=reason, crashes=counted)

    def _counted(self, crashes: dict[str, int]) -> dict[str, int]:
        """One more crash at the newest step that was logged or saved: without progress it is the same step again."""
        saved = [int(path.name[5:]) for path in self.checkpoints.glob("step-????????") if path.name[5:].isdigit()]
        step = str(max([run_files.last_logged_step(self.path), *saved]))
        return crashes | {step: crashes.get(step, 0) + 1}

    def cut_log(self, step: int) -> None:
        """Drop the lines of `log.jsonl` after `step`, see `run_files.cut_log`."""
        patiently(lambda: run_files.cut_log(self.path, step))


def patiently(action: Callable[[], T]) -> T:
    """The result of `action`, tried again for OUTAGE_S while the file system fails. Raises the last OSError."""
    deadline, pause_s = time.monotonic() + OUTAGE_S, 0.1
    while True:
        try:
            return action()
        except OSError:
            if time.monotonic() + pause_s > deadline:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 5.0)


def _requeues() -> int:
    """How often SLURM has requeued this job."""
    count = os.environ.get("SLURM_RESTART_COUNT", "0")
    return int(count) if count.isdigit() else 0


def _ends_soon(holder: str) -> bool:
    """Whether the process that wrote `holder` into the lock will end by itself.

    It does where its launcher, on this machine, is dead; and where its job is that of this process and was requeued
    since: its node was cut off, and this attempt is the newer one. A second start inside one allocation (`salloc`) has
    the same job and the same count of requeues, and waits for nothing.
    """
    found = re.fullmatch(r"pid \d+ on (.+?)(?:, job (\w+)(?: requeued (\d+))?)?(?:, launcher (\d+))?", holder)
    if found is None:
        return False
    node, job, requeues, launcher = found.groups()
    if job is not None and job == os.environ.get("SLURM_JOB_ID") and int(requeues or 0) < _requeues():
        return True
    if launcher is None or node != platform.node():
        return False
    try:
        os.kill(int(launcher), 0)
        stat = Path(f"/proc/{launcher}/stat").read_text(encoding="utf-8")
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "Z"  # a zombie: killed, and its parent has not noticed yet
