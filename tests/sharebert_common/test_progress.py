"""A bar on a terminal, nothing in a file."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

CODE = """
from sharebert_common.progress import progress
print(list(progress(iter("abc"), "writing weights", 3)))
"""


def test_a_file_holds_no_bar() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout == "['a', 'b', 'c']\n"
    assert done.stderr == ""


def test_a_terminal_shows_how_many_are_done() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=theirs, check=True, env=environment
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # Linux reports the end of a terminal as an error
        pass
    os.close(ours)
    assert done.stdout == b"['a', 'b', 'c']\n"
    assert b"writing weights" in shown
    assert b"3/3" in shown
