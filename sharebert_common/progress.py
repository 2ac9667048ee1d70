"""A progress bar on a terminal; where stderr is a file or a pipe, nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

Progress = Callable[[Iterable[Any], str, float], Iterable[Any]]
"""Gives the items one by one, and shows how far it is: as `progress` does, or as part of another bar."""


def progress(items: Iterable[T], what: str, total: float) -> Iterator[T]:
    """The items one by one, with a bar on stderr that vanishes at the end.

    Args:
        items: what is done; each counts 1.
        what: the words before the bar.
        total: the number of items.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console  # 50 ms that a job without a terminal does without
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(items, total=total, description=what)
