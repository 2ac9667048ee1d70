"""TensorBoard's event files of a run."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
"""TensorBoard's tag for each key of a line of `log.jsonl`."""


class EventFile:
    """Writes points. After a failed write a new file continues from the same step, and the failed one is left."""

    def __init__(self, path: Path, resumed_from: int, config_yaml: str) -> None:
        self.path = path
        self.waiting: list[dict[str, Any]] = []
        self._writer: SummaryWriter | None = None
        self._config_yaml = "" if resumed_from else config_yaml
        self._purge_step = resumed_from + 1 if resumed_from else 0  # an earlier attempt may have died at once

    def write(self) -> None:
        """Write the points of the lines that wait. Raises OSError where the disk does not take them."""
        try:
            if self._writer is None:
                self._writer = open_writer(self.path, self._purge_step)
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
        """Close the file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()


def open_writer(folder: Path, purge_step: int) -> SummaryWriter:
    """A writer of a new event file in `folder`. TensorBoard drops earlier files' points from `purge_step` on.

    TensorBoard reads the files of a folder in the order of their names, which begin with the time. So the name of the
    new file is later than all others, even where the clock was set back between two attempts.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.writer import FileWriter

    class EventWriter:
        """What torch's FileWriter writes through: records of one file, written at once."""

        def __init__(self, path: Path) -> None:
            self._records = RecordWriter(path.open("wb"))
            self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

        def get_logdir(self) -> str:
            return str(folder)

        def add_event(self, event: Any) -> None:
            self._records.write(event.SerializeToString())

        def flush(self) -> None:
            self._records.flush()

        def close(self) -> None:
            self._records.close()

    class Writer(SummaryWriter):
        """torch's writer with a file name of ours."""

        def _get_file_writer(self) -> Any:
            if self.file_writer is None:
                writer = FileWriter.__new__(FileWriter)
                writer.event_writer = EventWriter(folder / next_name(folder))
                writer.add_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
                self.file_writer, self.all_writers = writer, {str(folder): writer}  # type: ignore[assignment]
            return self.file_writer

    folder.mkdir(parents=True, exist_ok=True)
    return Writer(str(folder))


def next_name(folder: Path) -> str:
    """A name for an event file that sorts behind all others in `folder`."""
    seconds = int(time.time())
    for path in folder.glob("events.out.tfevents.*"):
        number = path.name.split(".")[3]
        if number.isdigit():
            seconds = max(seconds, int(number) + 1)
    return f"events.out.tfevents.{seconds:010d}.{platform.node()}.{os.getpid()}"
