"""What people see of a run as it trains: a progress bar on a terminal, steady lines in a job's log."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")


def time_left(seconds: float) -> str:
    """A duration in its two largest units: `2 d 3 h`, `3 h 5 min`, `5 min 10 s`."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds % 60)} s"


class Terminal:
    """Shows the lines of the log."""

    def __init__(self, steps: int, step: int) -> None:
        """`steps` is where the run ends, `step` where it is."""
        self._steps = steps
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("training", total=steps, completed=step, line="")

    def show(self, values: dict[str, Any]) -> None:
        """Show one line of the log."""
        step = values["step"]
        if "valid_loss" in values:
            text = f"valid loss {values['valid_loss']:.4f}  accuracy {values['valid_accuracy']:.3f}"
            self._print(f"step {step}/{self._steps}  {text}")
            return
        loss, norm = values.get("loss", float("nan")), values.get("grad_norm", float("inf"))
        text = f"loss {loss:.4f}  lr {values['lr']:.2e}  grad norm {norm:.2f}  {values['tokens_per_s']:,.0f} tokens/s"
        if self._bar is None and "step_s" in values:
            text += f"  {time_left(values['step_s'] * (self._steps - step))} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=text)
        else:
            self._print(f"step {step}/{self._steps}  {text}")

    def progress(self, items: Iterable[T], what: str, total: float) -> Iterator[T]:
        """The items one by one, with a bar of their own on a terminal until they end."""
        if self._bar is None:
            yield from items
            return
        task = self._bar.add_task(what, total=total, line="")
        try:
            yield from self._bar.track(items, total=total, task_id=task)
        finally:
            self._bar.remove_task(task)

    def close(self) -> None:
        """Leave the terminal."""
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            with contextlib.suppress(OSError):  # a full disk, where the job's log lies on one
                print(text, file=sys.stderr, flush=True)
