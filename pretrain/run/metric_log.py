"""What a run shows of itself: `log.jsonl`, TensorBoard, and the terminal.

A full disk or a failing write loses no line and never ends the run: lines wait in memory until they can be written.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from pretrain.run.event_file import EventFile
from pretrain.run.folder import RunFolder
from pretrain.run.terminal import Terminal
from sharebert_common.recipe import STRICT
from sharebert_common.run_files import LogWriter


@dataclass(config=STRICT, kw_only=True)
class MonitorRecipe:
    """What is logged, and how often."""

    every: Annotated[int, Field(gt=0)] = 10
    """Optimizer steps between lines. The loss of a line is the mean over its steps."""
    peak_flops: Annotated[float, Field(ge=0)] = 0.0
    """Peak FLOP/s of one device, for the utilisation (mfu); 0 takes the device's from a table."""


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
        for output in self._outputs:
            output.waiting.append(values)
            self._write(output)
        self._terminal.show(values)

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
            if output.waiting:
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
