"""A bar on a terminal, nothing in a file."""

from __future__ import annotations

import subprocess
import sys

from terminals import shown_on_a_terminal

CODE = """
from sharebert_common.progress import progress
print(list(progress(iter("abc"), "writing weights", 3)))
"""


def test_a_file_holds_no_bar() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout == "['a', 'b', 'c']\n"
    assert done.stderr == ""


def test_a_terminal_shows_how_many_are_done() -> None:
    printed, shown = shown_on_a_terminal(CODE)
    assert printed == "['a', 'b', 'c']\n"
    assert "writing weights" in shown
    assert "3/3" in shown
