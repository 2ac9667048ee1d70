"""Stopping when asked: signals set a flag, and a file in the run does the same.

A stop is carried out by all ranks together, after the step that they are in: the flag only rides along
in the all-reduce that every step makes anyway. (A save is collective: called by one rank alone, from a
signal handler, it would wait for ever.)
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this rank was asked to stop. Signals are taken from the moment that it is made."""

    def __init__(self, stop_file: Path | None) -> None:
        """`stop_file` is looked for by one rank only, so that thousands do not ask the file system each step."""
        self._stop_file = stop_file
        self._signal: int | None = None
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

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

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
