"""How far it is: a live bar on a terminal, else a line a minute."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 60.0


class StageProgress:
    """Progress of one stage; a context manager.

    Args:
        stage: its name.
        parts: how many there are to do.
        text_bytes: how much text they hold, as far as known.
    """

    def __init__(self, stage: str, parts: int, text_bytes: int) -> None:
        self._stage, self._parts, self._text_bytes = stage, parts, max(text_bytes, 1)
        self._done = self._bytes = self._tokens = 0
        self._started = self._said = time.monotonic()
        console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description:>8}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(stage, total=self._text_bytes, rate="")

    def __enter__(self) -> StageProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            print(f"prep: {self._stage}: {self._rate()} · done", file=sys.stderr, flush=True)

    def advance(self, text_bytes: int, tokens: int) -> None:
        """One more part is done."""
        self._done += 1
        self._bytes += text_bytes
        self._tokens += tokens
        if self._bar:
            self._bar.update(self._task, completed=min(self._bytes, self._text_bytes), rate=self._rate())
        elif time.monotonic() - self._said >= LINE_EVERY_S:
            self._say()

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        tokens = f" · {self._tokens / seconds / 1e6:.1f} M tokens/s" if self._tokens else ""
        return f"{self._done}/{self._parts} parts · {self._bytes / seconds / 1e6:.1f} MB/s{tokens}"

    def _say(self) -> None:
        self._said = time.monotonic()
        seconds = self._said - self._started
        left = seconds * (self._text_bytes / self._bytes - 1) if self._bytes else 0
        print(f"prep: {self._stage}: {self._rate()} · {max(left, 0):.0f} s left", file=sys.stderr, flush=True)
