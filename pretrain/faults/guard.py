"""A small process beside a rank that ends it when no Python code runs in it any more.

    python guard.py PID     a line on standard input: so many seconds until the next line must come

A library that hangs while it holds the interpreter's lock stops every thread of the rank, its watchdog too. This
process then asks for the rank's stacks (SIGQUIT, which `faulthandler` serves without the lock) and kills it. It ends
with the rank, whose death closes standard input. It imports nothing of the project, so that it starts at once.

Seconds in which this process or the rank did not run do not count: SIGSTOP, `scontrol suspend`, a laptop's lid.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

TICK_S = 0.2
STACKS_S = 1.0
"""How long the rank has to write its stacks."""


def is_stopped(pid: int) -> bool:
    """Whether a process is suspended by a signal."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:  # noqa: PTH123 (pathlib takes long to import)
            return stat.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def main(pid: int) -> None:
    """Watch process `pid` until standard input is closed."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the ranks of its process group
    left_s = float("inf")
    while True:
        started = time.monotonic()
        if select.select([0], [], [], TICK_S)[0]:
            lines = os.read(0, 65536).decode().split()
            if not lines:
                return
            left_s = float(lines[-1])
        elif not is_stopped(pid):
            left_s -= min(time.monotonic() - started, 2 * TICK_S)
            if left_s < 0:
                os.kill(pid, signal.SIGQUIT)
                time.sleep(STACKS_S)
                os.kill(pid, signal.SIGKILL)
                return


if __name__ == "__main__":
    main(int(sys.argv[1]))
