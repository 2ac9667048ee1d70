"""Progress: a live bar on a terminal, otherwise a line a minute for a log file."""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Any

LINE_EVERY_S = 60.0


def say(line: str) -> None:
    """Print one line to stderr; stdout is for the result of the command."""
    print(f"prep: {line}", file=sys.stderr, flush=True)


class StageProgress:
    """Progress of one stage, as a context manager. Parts are of about equal size, so their number gives the time left.

    Args:
        stage: name of the stage.
        parts: number of parts to do.
    """

    def __init__(self, stage: str, parts: int) -> None:
        self._stage, self._parts = stage, parts
        self._done = self._bytes = self._tokens = 0
        self._started = time.monotonic()
        self._bar = _bar(stage, parts) if sys.stderr.isatty() else None
        self._ended = threading.Event()
        self._lines = threading.Thread(target=self._say_every_minute, daemon=True)

    def __enter__(self) -> StageProgress:
        if self._bar:
            self._bar.start()
        else:
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
            return
        self._ended.set()
        self._lines.join()
        if kind is None:
            say(f"{self._stage}: {self._rate()} · done")

    def advance(self, size_bytes: int, tokens: int) -> None:
        """One more part is done, with this many bytes of text (or of a shard) and tokens."""
        self._done += 1
        self._bytes += size_bytes
        self._tokens += tokens
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._done, rate=self._rate())

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        megabytes = f" · {self._bytes / seconds / 1e6:.1f} MB/s" if self._bytes else ""
        tokens = f" · {self._tokens / seconds / 1e6:.1f} M tokens/s" if self._tokens else ""
        return f"{self._done}/{self._parts} parts{megabytes}{tokens}"

    def _say_every_minute(self) -> None:
        """Run in a thread of its own, because a part may take longer than a minute."""
        while not self._ended.wait(LINE_EVERY_S):
            seconds = time.monotonic() - self._started
            left = f" · {_duration(seconds * (self._parts / self._done - 1))} left" if self._done else ""
            say(f"{self._stage}: {self._rate()}{left}")


def _bar(stage: str, parts: int) -> Any:
    from rich.console import Console  # 50 ms that a worker does without
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    bar.add_task(stage, total=parts, rate="")
    return bar


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
