"""What a run shows: TensorBoard, `log.jsonl`, and a progress bar on a terminal or steady lines in a log.

A full disk or a failing write costs no line and never ends the run: lines wait in memory until they can be
written.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from pretrain.run.folder import RunFolder
from sharebert_common.recipe import STRICT
from sharebert_common.run_files import LogWriter

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

TAGS = {
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "data_wait_s": "speed/data_wait",
    "step_s": "speed/step_s",
    "skipped": "health/skipped",
    "loss_deviations": "health/loss_deviations",
    "slowest_rank_factor": "health/slowest_rank_factor",
    "memory_bytes": "health/memory_bytes",
    "valid_loss": "valid/loss",
    "valid_accuracy": "valid/accuracy",
}
"""TensorBoard's tag for each key of a line of the log."""


@dataclass(config=STRICT, kw_only=True)
class MonitorRecipe:
    """What is logged, and how often."""

    every: Annotated[int, Field(gt=0)] = 10
    """Optimizer steps between lines; the loss of a line is the mean over its steps."""
    peak_flops: Annotated[float, Field(ge=0)] = 0.0
    """Peak FLOP/s of one device, for the utilisation (mfu); 0 looks the device up."""


class Monitor:
    """Rank 0's view of the run; on other ranks it does nothing."""

    def __init__(self, run: RunFolder, *, enabled: bool, steps: int, step: int, config_yaml: str) -> None:
        """`step` is that of the loaded checkpoint: later points of an earlier launch are dropped."""
        self._enabled = enabled
        if not enabled:
            return
        self._run, self._steps = run, steps
        self._open(step, config_yaml)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._bar_task = self._bar.add_task("training", total=steps, completed=step, line="")

    def _open(self, step: int, config_yaml: str) -> None:
        self._log = LogWriter(self._run.log)
        self._board = _Board(self._run.tensorboard, step, config_yaml)

    def go_back(self, step: int) -> None:
        """Drop what was logged after `step`, and go on from there."""
        if self._enabled:
            self._board.close()
            self._log.close()
            self._run.cut_log(step)
            self._open(step, "")

    def line(self, values: dict[str, Any]) -> None:
        """Log one line; `values` has the keys of NAMES of a line of `log.jsonl`, with `step`."""
        if not self._enabled:
            return
        values = {key: value for key, value in values.items() if value is not None} | {"time": time.time()}
        for output in (self._log, self._board):
            output.waiting.append(values)
            self._write(output)
        self._show(values)

    def _write(self, output: LogWriter | _Board) -> None:
        try:
            output.write()
        except OSError as error:
            self._run.say(f"{output.path}: {error.strerror or error}; {len(output.waiting)} lines wait to be written")

    def close(self) -> None:
        """Close the files. Lines that wait are tried once more, for the last checkpoint may have waited for room as
        well; what cannot be written now is gone."""
        if self._enabled:
            for output in (self._log, self._board):
                if output.waiting:
                    self._write(output)
            if self._bar is not None:
                self._bar.stop()
            self._board.close()
            self._log.close()

    def _show(self, values: dict[str, Any]) -> None:
        step = values["step"]
        if "valid_loss" in values:
            text = f"valid loss {values['valid_loss']:.4f}  accuracy {values['valid_accuracy']:.3f}"
            self._print(f"step {step}/{self._steps}  {text}")
            return
        loss, norm = values.get("loss", float("nan")), values.get("grad_norm", float("inf"))
        text = f"loss {loss:.4f}  lr {values['lr']:.2e}  grad norm {norm:.2f}  {values['tokens_per_s']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=step, line=text)
        else:
            self._print(f"step {step}/{self._steps}  {text}")

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            with contextlib.suppress(OSError):  # a full disk, where the job's log lies on one
                print(text, file=sys.stderr, flush=True)


class _Board:
    """TensorBoard's event files. One that failed is left as it is, and another one goes on from the same step."""

    def __init__(self, path: Path, resumed_from: int, config_yaml: str) -> None:
        self.path = path
        self.waiting: list[dict[str, Any]] = []
        self._writer: SummaryWriter | None = None
        self._config_yaml = "" if resumed_from else config_yaml
        self._purge_step = resumed_from + 1 if resumed_from else 0  # a launch before may have died at once

    def write(self) -> None:
        """Write the points of the lines that wait. Raises OSError where the disk does not take them."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self._writer is None:
                self._writer = SummaryWriter(str(self.path), purge_step=self._purge_step)
                if self._config_yaml:
                    self._writer.add_text("config", f"```yaml\n{self._config_yaml}\n```", 0)
            for values in self.waiting:
                for key, tag in TAGS.items():
                    if key in values:
                        self._writer.add_scalar(tag, values[key], values["step"])
            self._writer.flush()
        except OSError:
            self._purge_step = self.waiting[0]["step"]
            self.close()
            self._writer = None
            raise
        self._config_yaml = ""
        self.waiting.clear()

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
