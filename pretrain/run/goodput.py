"""Goodput of a run: the time of the steps that count, over the wall time since its first attempt.

Steps that an attempt lost, since it died after its last checkpoint, do not count; nor does the time of waiting in a
queue, starting, validating and saving.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Goodput:
    """Adds up the lines of a log."""

    def __init__(self, lines: Sequence[dict[str, Any]], started: float | None = None) -> None:
        """`lines` are those so far; `started` is the time of the first attempt, else that of the first line."""
        self.useful_s, self._last_step = 0.0, 0
        self._started = started
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> float | None:
        """Count a line; the goodput at its time. None for a line without steps."""
        if "step_s" not in line:
            return None
        seconds = line["step_s"] * (line["step"] - self._last_step)
        now = line.get("time", time.time())
        if self._started is None:
            self._started = now - seconds
        self.useful_s, self._last_step = self.useful_s + seconds, line["step"]
        return self.useful_s / max(now - self._started, self.useful_s, 1e-9)


def first_start(environment: Path) -> float | None:
    """When the first attempt of a run started, by its environment.json; None where that cannot be read."""
    try:
        return float(json.loads(environment.read_text(encoding="utf-8"))[0]["time"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
