"""Run Python code on a terminal, and see what it shows there."""

from __future__ import annotations

import os
import pty
import subprocess
import sys


def shown_on_a_terminal(code: str) -> tuple[str, str]:
    """What the code printed, and what a terminal of 80 columns at its standard error was sent. Raises if it failed."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, check=True, env=environment, text=True
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # Linux reports the end of a terminal as an error
        pass
    os.close(ours)
    return done.stdout, shown.decode()
