"""Signals that ask for a stop, what Linux does with a process whose parent dies, and the memory of a process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that SLURM and people announce an end with."""

STARTED_BY = "SHAREBERT_STARTED_BY"
"""Environment variable: the process that started this one, for `signal_on_starter_death`."""

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class StopSignals:
    """Notes the stop signals that this process gets, from `catch` on, in place of what they did before.

    In a `with` statement it notes them inside, and afterwards they do what they did before.

    `on_first` is called at the first of them, in the signal handler: it must be short, and raise nothing.

    With `interrupt` Ctrl-C (SIGINT) is one of them, unless this process ignores it, as in the background of a script. A
    second Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self, on_first: Callable[[], None] | None = None, *, interrupt: bool = False) -> None:
        self.received: int | None = None
        """The newest signal; None before the first."""
        self._on_first, self._interrupt, self._interrupted = on_first, interrupt, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """See `catch`."""
        self.catch()
        return self

    def __exit__(self, *raised: object) -> None:
        """Give signals back to who had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def catch(self) -> None:
        """Note signals from now on. Outside of the main thread, where Python allows no handlers, this does nothing."""
        self._handle(self._note)

    def ignore(self) -> None:
        """Ignore signals from now on: a late one does no harm to the exit code. (As it ends, Python drops handlers.)"""
        self._handle(signal.SIG_IGN)

    def _handle(self, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
        if threading.current_thread() is threading.main_thread():
            interrupt = self._interrupt and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
            for number in (*STOP_SIGNALS, *([signal.SIGINT] if interrupt else [])):
                self._before.setdefault(number, signal.signal(number, handler) or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        first = self.received is None
        self.received = number
        if first and self._on_first is not None:
            self._on_first()


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far.

    On Linux it is VmHWM: what `getrusage` reports may be that of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def signal_on_parent_death(number: int) -> None:
    """Let Linux send this signal to this process when its parent dies; elsewhere this does nothing."""
    _prctl(_SET_PDEATHSIG, number)


def environment_for_child() -> dict[str, str]:
    """The environment of a process that is to end with this one, see `signal_on_starter_death`."""
    return os.environ | {STARTED_BY: str(os.getpid())}


def starter() -> int | None:
    """The process that started this one with `environment_for_child`; None where none did."""
    given = os.environ.get(STARTED_BY, "")
    return int(given) if given.isdigit() else None


def signal_on_starter_death(number: int) -> None:
    """Let this process get a signal when its `starter` dies, also where that is dead already."""
    if (parent := starter()) is not None:
        signal_on_parent_death(number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Make this process the new parent of orphans among its descendants, in place of process 1."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
