"""A stop that was asked for: signals set a flag, and a file in the run directory does the same.

All ranks stop together, after the step that they are in: the flag travels in the all-reduce that every step makes
anyway. (A save is collective: one rank that saved alone, in a signal handler, would wait for the others for ever.)
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from sharebert_common.processes import StopSignals, signal_on_parent_death, signal_on_starter_death


class StopRequest:
    """Whether this rank was asked to stop. It notes signals from the moment that it is made."""

    def __init__(self) -> None:
        self._stop_file: Path | None = None
        self._signals = StopSignals(self._answer, interrupt=True)
        self._signals.catch()

    def _answer(self) -> None:
        if self._signals.received == signal.SIGINT:
            os.write(2, b"\nstopping after this step, and saving; Ctrl-C again ends at once, without saving\n")

    def watch(self, stop_file: Path) -> None:
        """Treat the appearance of this file as a request. Only one rank looks: thousands would load the file system."""
        self._stop_file = stop_file

    @property
    def asked(self) -> bool:
        """Whether a signal came, or the file is there."""
        # `os.path.exists` is False where the file system does not answer; `Path.exists` raises (ESTALE, for instance).
        return self._signals.received is not None or (
            self._stop_file is not None and os.path.exists(self._stop_file)  # noqa: PTH110
        )

    @property
    def reason(self) -> str | None:
        """What asked this rank for a stop, for `state.json`. None where only another rank was asked so far."""
        if self._signals.received is not None:
            return f"signal {signal.Signals(self._signals.received).name}"
        return "file 'stop'" if self.asked else None

    def close(self) -> None:
        """Ignore signals from now on: the process is ending."""
        self._signals.ignore()


def die_with_the_launcher() -> None:
    """Die when the launcher does: a torchrun that is killed leaves its workers running.

    For the time before this rank has joined the others. There is nothing to save yet, and a rank that waited on would
    join the next attempt.
    """
    launcher = os.getppid()
    signal_on_parent_death(signal.SIGKILL)
    if os.getppid() != launcher or not _runs_python(launcher):  # it died before this process came to this line
        os._exit(1)


def _runs_python(pid: int) -> bool:
    """Whether a process runs Python, as torchrun does. An orphan's new parent (init, a service manager) does not."""
    if sys.platform != "linux":
        return True
    try:
        return Path(f"/proc/{pid}/exe").readlink().name.startswith(("python", "pypy"))
    except FileNotFoundError:
        return not Path("/proc/self/exe").exists()  # without /proc nothing can be said
    except PermissionError:  # a process of another user
        return False


def stop_with_the_launcher() -> None:
    """Get TERM when the launcher dies, from the time on when all ranks can save together."""
    signal_on_parent_death(signal.SIGTERM)


def stop_with_the_sweep() -> None:
    """Get TERM when the command that started this training dies: started again, it would train the same run."""
    signal_on_starter_death(signal.SIGTERM)
