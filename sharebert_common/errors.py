"""What ends a command: one base class, and the exit codes."""

from __future__ import annotations

import difflib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

FINISHED, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
"""Exit codes of every command. STOPPED: a stop was asked for and the state is saved; run the command again."""


class CommandError(Exception):
    """Ends a command with a message for the user and an exit code."""

    exit_code = FAILED


class BadInput(CommandError, ValueError):
    """What the user gave is wrong. The message is the one line that they see."""

    exit_code = BAD_INPUT


REFUSAL_WAIT = "SHAREBERT_REFUSAL_WAIT_S"
"""Environment variable: how many seconds a worker that refused its input waits to be ended."""


def write_refusal(error: BadInput) -> None:
    """Tell whoever started torchrun that this worker refused what it was given, in the error file that torchrun names.

    torchrun itself cannot pass on an exit code of its workers, and restarts one that ends with any code but 0. So the
    worker then waits for as long as REFUSAL_WAIT says, in which the reader of the file can end torchrun. Without
    torchrun this does nothing.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        content = {"message": str(error), "timestamp": int(time.time()), "exit_code": error.exit_code}
        with suppress(OSError):
            Path(file).write_text(json.dumps(content), encoding="utf-8")
            time.sleep(float(os.environ.get(REFUSAL_WAIT, 0)))


def read_refusal(file: Path) -> str | None:
    """The message that `write_refusal` wrote to a worker's error file; None for any other content."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(content["message"]) if content.get("exit_code") == BAD_INPUT else None


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word nearest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
