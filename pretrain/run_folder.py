"""The run directory: what lies where, who may use it, and `state.json`.

RUN/config.yaml  RUN/tokenizer.json  RUN/environment.json  RUN/state.json  RUN/log.jsonl
RUN/tensorboard/  RUN/checkpoints/  RUN/heartbeats/  RUN/bad_rows.jsonl
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from sharebert_recipe import BadInput, write_atomically

PACKAGES = ("sharebert", "torch", "deepspeed", "numpy", "safetensors", "tokenizers", "tensorboard", "triton")


class RunFolder:
    """The files of one run. Every rank may read; only rank 0 calls what writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

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
        """One JSON object a logging interval."""
        return self.path / "log.jsonl"

    @property
    def bad_rows(self) -> Path:
        """Rows that were given up; the run passes over them."""
        return self.path / "bad_rows.jsonl"

    @property
    def heartbeats(self) -> Path:
        """Where each rank says how far it is."""
        return self.path / "heartbeats"

    @property
    def stop_file(self) -> Path:
        """A file of this name asks for a stop."""
        return self.path / "stop"

    def occupy(self) -> None:
        """Make the folder and take its lock, which the operating system drops when this process dies.

        Raises BadInput where the folder cannot be made, or another launch of the run is alive.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"{self.path}: not usable as a run directory ({error.strerror})") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise BadInput(f"{self.path}: in use by another launch of this run ({lock.read().strip()})") from error
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {platform.node()}")
        lock.flush()
        self._lock = lock

    def release(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def say(self, text: str) -> None:
        """A line for people in the terminal or the job's log."""
        print(f"{self.path}: {text}", file=sys.stderr, flush=True)

    def read_state(self) -> dict[str, Any]:
        """The content of `state.json`; empty before the first start. Raises BadInput where it is not JSON."""
        path = self.path / "state.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise BadInput(f"{path}: not JSON ({error})") from error

    def write_state(self, state: str, *, reason: str = "", step: int | None = None, **changes: Any) -> None:
        """Say how the run stands; what is not given stays."""
        now = {"step": 0, "restarts": 0, "crashes": {}, "job": None} | self.read_state() | changes
        now |= {"state": state, "reason": reason, "updated": time.time()}
        if step is not None:
            now["step"] = step
        try:
            write_atomically(self.path / "state.json", json.dumps(now, indent=1) + "\n")
        except OSError as error:  # a full disk does not end a training
            self.say(f"state.json could not be written ({error.strerror})")

    def start(self, *, step: int, steps: int, tokenizer: Path, facts: dict[str, Any]) -> None:
        """Note a launch that goes on from `step`: its tokenizer, environment and state; drop an old stop request."""
        self.stop_file.unlink(missing_ok=True)
        temporary = self.tokenizer.with_name(".tokenizer.json.partial")
        shutil.copyfile(tokenizer, temporary)
        temporary.replace(self.tokenizer)
        self._record_environment(facts)
        self.cut_log(step)
        before = self.read_state()
        restarts = before["restarts"] + 1 if before else 0
        job = os.environ.get("SLURM_JOB_ID")
        self.write_state("running", step=step, steps=steps, restarts=restarts, job=job)

    def _record_environment(self, facts: dict[str, Any]) -> None:
        """Append this start to `environment.json`."""
        path = self.path / "environment.json"
        try:
            starts = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            starts = []
        starts.append(
            {
                "time": time.time(),
                "host": platform.node(),
                "python": platform.python_version(),
                "packages": {name: _version(name) for name in PACKAGES},
                "commit": _commit(),
                "cpu_count": os.cpu_count(),
                **facts,
            }
        )
        write_atomically(path, json.dumps(starts, indent=1) + "\n")

    def cut_log(self, step: int) -> None:
        """Drop the lines of `log.jsonl` after `step`: a run that goes on from there will write them again."""
        if not self.log.exists():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # the last line of a killed run may be half a line
        write_atomically(self.log, "".join(line + "\n" for line in kept))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source checkout that this code runs from, if it is one."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
