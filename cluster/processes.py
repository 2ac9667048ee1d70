"""A command that an agent runs: it gets signals only when it is ready for them, and leaves nobody behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""What SLURM announces an end with."""

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class Signals:
    """Notes the signals that this process gets, in place of whatever they did before. A context manager."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """The notes go on: this process is about to end, and must not die of a late signal before it has."""

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


def start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a command that ignores `SIGNALS` (its children may take them up again), and ends when this process does."""
    _prctl(_SET_CHILD_SUBREAPER, 1)  # orphans of the command come to us, and not to process 1
    return subprocess.Popen(command, env=environment, preexec_fn=_prepare, stdin=subprocess.DEVNULL)


def _prepare() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _prctl(_SET_PDEATHSIG, signal.SIGHUP)  # torchrun takes this one, and ends its workers


def children(pid: int) -> list[int]:
    """The processes that `pid` started and that are alive."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in file.read_text().split()]
        except OSError:
            continue
    return found


def relay(number: int, pid: int) -> None:
    """Send a signal to the children of `pid`."""
    for child in children(pid):
        _kill(child, number)


def end(command: subprocess.Popen[bytes]) -> None:
    """Kill a command and all that descends from it; an orphan of it is a child of ours."""
    for pid in [*_descendants(command.pid), command.pid]:
        _kill(pid, signal.SIGKILL)
    command.wait()
    while orphans := children(os.getpid()):
        for pid in orphans:
            _kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield from _descendants(child)
        yield child


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value)
