"""`log.jsonl`: one JSON object a logging interval. A line is in it whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any


class LogFile:
    """Appends lines. Lines that could not be written wait in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[dict[str, Any]] = []
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self) -> None:
        """Write the lines that wait. Raises OSError where the disk does not take them."""
        while self.waiting:
            line = (json.dumps(self.waiting[0]) + "\n").encode()
            size = os.fstat(self._handle).st_size
            if os.write(self._handle, line) < len(line):
                os.ftruncate(self._handle, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            del self.waiting[0]

    def sync(self) -> None:
        """Make durable what was written. Raises OSError."""
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)
