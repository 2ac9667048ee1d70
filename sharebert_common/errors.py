"""What ends a command: one base class, and the exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FINISHED, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
"""Exit codes of every command. STOPPED: a stop was asked for and the state is saved; run the command again."""


class CommandError(Exception):
    """Ends a command with a message for the user and an exit code."""

    exit_code = FAILED


class BadInput(CommandError, ValueError):
    """What the user gave is wrong. The message is the one line that they see."""

    exit_code = BAD_INPUT


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word nearest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
