"""What a run shows of itself: `log.jsonl`, TensorBoard, and the terminal.

A full disk or a failing write loses no line and never ends the run: lines wait in memory until they can be written.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from pretrain.run.event_file import EventFile
from pretrain.run.folder import RunFolder
from pretrain.run.goodput import Goodput, first_start
from pretrain.run.terminal import Terminal
from sharebert_common.recipe import STRICT
from sharebert_common.run_files import EVENTS_FILE, LogWriter, append_json_line, read_log

if TYPE_CHECKING:
    from pretrain.run.look import Look

T = TypeVar("T")

SENTENCES = (
    "The capital of France is [MASK].",
    "She opened the [MASK] and went into the house.",
    "Water is made of hydrogen and [MASK].",
    "The king and the [MASK] ruled the country.",
    "He was very [MASK] because he had not slept.",
    "Two plus two is [MASK].",
)
"""What TensorBoard shows the likeliest words of."""


@dataclass(config=STRICT, kw_only=True)
class MonitorRecipe:
    """What is logged, and how often."""

    every: Annotated[int, Field(gt=0)] = 10
    """Optimizer steps between lines. The loss of a line is the mean over its steps."""
    peak_flops: Annotated[float, Field(ge=0)] = 0.0
    """Peak FLOP/s of one device, for the utilisation (mfu); 0 takes the device's from a table."""
    sentences: list[str] = field(default_factory=lambda: list(SENTENCES))
    """Sentences with [MASK], whose likeliest words TensorBoard shows at each validation. An empty list shows none."""
    look: bool = True
    """Show sentences, weights and attention in TensorBoard at each validation. ZeRO 3 has no whole weights on a
    rank, so there they are left out."""
    profile: list[Annotated[int, Field(gt=0)]] = field(default_factory=list)
    """Optimizer steps of which rank 0 writes a trace, RUN/profiles/step-N.json.gz, which Perfetto and Chrome open."""


class MetricLog:
    """Logs the lines of a run on rank 0; on other ranks it does nothing."""

    def __init__(self, run: RunFolder, *, enabled: bool, steps: int) -> None:
        """`steps` is where the run ends."""
        self._run, self._enabled, self._steps = run, enabled, steps
        self._outputs: list[LogWriter | EventFile] = []
        self._terminal: Terminal | None = None

    def open(self, step: int, config_yaml: str) -> None:
        """Log from `step` on, that of the loaded checkpoint. Later points of an earlier attempt are dropped."""
        if self._enabled:
            self._outputs = [LogWriter(self._run.log), EventFile(self._run.tensorboard, step, config_yaml)]
            self._terminal = self._terminal or Terminal(self._steps, step)
            self._goodput = Goodput(read_log(self._run.path), first_start(self._run.environment))

    def return_to(self, step: int) -> None:
        """Drop what was logged after `step`, and continue from there."""
        if self._enabled:
            for output in self._outputs:
                output.close()
            self._run.cut_log(step)
            self.open(step, "")

    def line(self, values: dict[str, Any]) -> None:
        """Log one line, with the keys of a line of `log.jsonl`, `step` among them. None stands for "not known"."""
        if self._terminal is None:
            return
        values = {key: value for key, value in values.items() if value is not None} | {"time": time.time()}
        if (goodput := self._goodput.add(values)) is not None:
            values["goodput"] = goodput
        for output in self._outputs:
            output.waiting.append(values)
            self._write(output)
        self._terminal.show(values)

    def progress(self, items: Iterable[T], what: str, total: float) -> Iterable[T]:
        """The items one by one; the terminal shows how far they are."""
        return items if self._terminal is None else self._terminal.progress(items, what, total)

    def look(self, look: Look) -> None:
        """Show a look into the model in TensorBoard."""
        for output in self._outputs:
            if isinstance(output, EventFile):
                output.looks.append(look)
                self._write(output)

    def event(self, step: int, text: str) -> None:
        """Note what happened to the run: in events.jsonl, and in TensorBoard with the next points."""
        if not self._enabled:
            return
        with suppress(OSError):
            append_json_line(self._run.path / EVENTS_FILE, {"time": time.time(), "step": step, "text": text})
        for output in self._outputs:
            if isinstance(output, EventFile):
                output.notes.append((step, text))

    def sync(self) -> None:
        """Make durable what is in `log.jsonl`, so that after a power cut a checkpoint has no step that the log lacks.

        Lines that wait because the disk is full are not in it yet, and a flush that fails is reported only.
        """
        for output in self._outputs:
            if isinstance(output, LogWriter):
                try:
                    output.sync()
                except OSError as error:
                    self._run.say(f"{output.path}: {error.strerror or error}")

    def close(self) -> None:
        """Close the files. Lines that wait are tried once more, since the last checkpoint may have waited for room as
        well; what cannot be written now is lost.
        """
        for output in self._outputs:
            if output.waiting or (isinstance(output, EventFile) and (output.looks or output.notes)):
                self._write(output)
        if self._terminal is not None:
            self._terminal.close()
        for output in self._outputs:
            output.close()
        self._outputs, self._terminal = [], None

    def _write(self, output: LogWriter | EventFile) -> None:
        try:
            output.write()
        except OSError as error:
            self._run.say(f"{output.path}: {error.strerror or error}; {len(output.waiting)} lines wait to be written")
