"""Stopping when asked: signals set a flag, and a file in the run does the same.

A stop is carried out by all ranks together, after the step that they are in: the flag only rides along
in the all-reduce that every step makes anyway. (A save is collective: called by one rank alone, from a
signal handler, it would wait for ever.)
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether this rank was asked to stop. Signals are taken from the moment that it is made."""

    def __init__(self) -> None:
        self._stop_file: Path | None = None
        self._signal: int | None = None
        self._handles_signals = threading.current_thread() is threading.main_thread()
        if self._handles_signals:
            for number in SIGNALS:
                signal.signal(number, self._note)

    def watch(self, stop_file: Path) -> None:
        """Take a file of this name for a request. One rank looks, so that thousands do not ask the file system."""
        self._stop_file = stop_file

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    @property
    def asked(self) -> bool:
        """True from the first signal, or the appearance of the file, on."""
        return self._signal is not None or (self._stop_file is not None and self._stop_file.exists())

    @property
    def reason(self) -> str:
        """What asked for the stop, for `state.json`."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        return "file 'stop'" if self.asked else "asked on another rank"

    def close(self) -> None:
        """The process is ending: a late signal does no harm to its exit code. (Ending, Python drops handlers.)"""
        if self._handles_signals:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)


def stop_with_the_launcher() -> None:
    """Let the system send TERM to this process when its launcher dies: killed, torchrun leaves its workers running."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
