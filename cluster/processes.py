"""A command that an agent runs: it gets signals only when it is ready for them, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from sharebert_common.processes import STOP_SIGNALS, adopt_orphans, signal_on_parent_death


def start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a command that ignores the stop signals and ends when this process dies.

    Its children may handle the stop signals themselves: `relay` sends them there.
    """
    adopt_orphans()  # so that `end` finds them
    return subprocess.Popen(command, env=environment, preexec_fn=prepare_child, stdin=subprocess.DEVNULL)


def prepare_child() -> None:
    """Called in a new process: it ignores the stop signals, as its children will, and gets SIGHUP when its parent dies.

    SLURM sends a signal to all processes of a step, not to the agent alone.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal_on_parent_death(signal.SIGHUP)  # torchrun handles this one, and ends its workers


def children(pid: int) -> list[int]:
    """The living processes that `pid` started."""
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
    """Kill a command and all its descendants; orphans among them are children of this process."""
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
