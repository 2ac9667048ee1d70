"""What a run shows: TensorBoard, `log.jsonl`, and a progress bar on a terminal or steady lines in a log."""

from __future__ import annotations

import json
import sys
import time
from typing import IO, TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from pretrain.run_folder import RunFolder
from sharebert_recipe import STRICT

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

    def __init__(self, run: RunFolder, *, enabled: bool, steps: int, resumed_from: int, config_yaml: str) -> None:
        """`resumed_from` is the step of the loaded checkpoint: later points of an earlier launch are dropped."""
        self._enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._log: IO[str] = run.log.open("a", encoding="utf-8")
        purge = resumed_from + 1 if resumed_from else None
        self._board: SummaryWriter = SummaryWriter(str(run.tensorboard), purge_step=purge)
        if not resumed_from:
            self._board.add_text("config", f"```yaml\n{config_yaml}\n```", 0)
        self._steps = steps
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
            self._bar_task = self._bar.add_task("training", total=steps, completed=resumed_from, line="")

    def line(self, values: dict[str, Any]) -> None:
        """Log one line; `values` has the keys of NAMES of a line of `log.jsonl`, with `step`."""
        if not self._enabled:
            return
        values = {key: value for key, value in values.items() if value is not None} | {"time": time.time()}
        self._log.write(json.dumps(values) + "\n")
        self._log.flush()
        for key, tag in TAGS.items():
            if key in values:
                self._board.add_scalar(tag, values[key], values["step"])
        self._board.flush()
        self._show(values)

    def close(self) -> None:
        """Write out everything."""
        if self._enabled:
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
        text = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"grad norm {values['grad_norm']:.2f}  {values['tokens_per_s']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=step, line=text)
        else:
            self._print(f"step {step}/{self._steps}  {text}")

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
