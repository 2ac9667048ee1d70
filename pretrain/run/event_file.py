"""TensorBoard's event files of a run."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from pretrain.run.look import Look

MOST_NATS = 50.0
"""A perplexity above e to this is shown as that."""

LAYOUT = {
    "learning": {
        "loss": ["Multiline", ["train/loss", "valid/loss"]],
        "perplexity": ["Multiline", ["train/perplexity", "valid/perplexity"]],
        "masked accuracy": ["Multiline", ["train/accuracy", "valid/accuracy"]],
        "learning rate": ["Multiline", ["train/lr"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "norms of weights": ["Multiline", ["weights/norm_E", "weights/norm_W_all"]],
        "change between validations": ["Multiline", ["weights/change_E", "weights/change_W_all"]],
    },
    "speed": {
        "tokens a second": ["Multiline", ["speed/tokens_per_s"]],
        "share of the peak": ["Multiline", ["speed/mfu"]],
        "seconds of a step": ["Multiline", ["speed/step_s"]],
        "waiting, shares of a step": ["Multiline", ["wait/rows", "wait/ranks", "wait/saves"]],
    },
    "health": {
        "goodput": ["Multiline", ["health/goodput"]],
        "skipped steps": ["Multiline", ["health/skipped"]],
        "loss scale": ["Multiline", ["train/loss_scale"]],
        "memory": ["Multiline", ["health/memory_bytes"]],
        "loss, standard deviations from its recent mean": ["Multiline", ["health/loss_deviations"]],
        "slowest rank": ["Multiline", ["health/slowest_rank_factor"]],
    },
}
"""The page "custom scalars": titles of its parts and charts, and the tags of each chart."""

COMPARED = ("train/loss", "valid/loss", "valid/accuracy", "speed/tokens_per_s", "health/goodput")
"""Tags that the page "hparams" compares runs by."""

WITHOUT_EFFECT = {"run", "checkpoint", "validate", "monitor", "faults", "collective_timeout_s"}
"""Parts of a config that do not change what is learned: the page "hparams" leaves them out."""

WAITS = {"data_wait_s": "wait/rows", "rank_wait_s": "wait/ranks", "save_wait_s": "wait/saves"}
"""Tags for shares of the seconds of a step."""

TAGS = {
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    "row_length": "train/row_length",
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
    "goodput": "health/goodput",
}
"""TensorBoard's tag for each key of a line of `log.jsonl`."""


class EventFile:
    """Writes points. After a failed write a new file continues from the same step, and the failed one is left.

    The new file makes TensorBoard drop all points of that step, also those that an earlier write brought to the disk.
    So these are kept until a later step is written, and are written again.
    """

    def __init__(self, path: Path, resumed_from: int, config_yaml: str) -> None:
        self.path = path
        self.waiting: list[dict[str, Any]] = []
        self._writer: SummaryWriter | None = None
        self._config_yaml = "" if resumed_from else config_yaml
        self.looks: list[Look] = []
        self.notes: list[tuple[int, str]] = []
        self._newest: tuple[list[dict[str, Any]], list[Look]] = [], []
        self._purge_step = resumed_from + 1 if resumed_from else 0  # an earlier attempt may have died at once

    def write(self) -> None:
        """Write the points of the lines that wait. Raises OSError where the disk does not take them."""
        first = min([*(line["step"] for line in self.waiting), *(look.step for look in self.looks)], default=None)
        try:
            if self._writer is None:
                self._writer = open_writer(self.path, self._purge_step)
                if self._config_yaml:
                    self._writer.add_text("config", f"```yaml\n{self._config_yaml}\n```", 0)
                    self._writer.add_custom_scalars(exact(LAYOUT))
                    for summary in hyperparameters(self._config_yaml):
                        self._writer._get_file_writer().add_summary(summary)
            for values in self.waiting:
                for tag, value in scalars(values).items():
                    self._writer.add_scalar(tag, value, values["step"])
            for look in self.looks:
                try:
                    _write_look(self._writer, look)
                except (ValueError, ArithmeticError, TypeError) as error:  # values that are not finite, for instance
                    self._writer.add_text("events", f"no look into the model ({error})", look.step)
            for step, note in self.notes:
                self._writer.add_text("events", note, step)
            self._writer.flush()
        except OSError:
            if first is not None and first >= self._purge_step:
                self._purge_step = first
                lines, looks = self._newest
                self.waiting[:0] = [line for line in lines if line["step"] >= first]
                self.looks[:0] = [look for look in looks if look.step >= first]
                self._newest = [], []
            self.close()
            self._writer = None
            raise
        self._config_yaml = ""
        lines, looks = self._newest[0] + self.waiting, self._newest[1] + self.looks
        newest = max([*(line["step"] for line in lines), *(look.step for look in looks)], default=0)
        self._newest = [x for x in lines if x["step"] == newest], [x for x in looks if x.step == newest]
        for waiting in (self.waiting, self.looks, self.notes):
            waiting.clear()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()


def scalars(values: dict[str, Any]) -> dict[str, float]:
    """The points of a line of the log, by tag."""
    found = {tag: values[key] for key, tag in TAGS.items() if key in values}
    for key, part in (("loss", "train"), ("valid_loss", "valid")):
        if key in values:
            found[f"{part}/perplexity"] = math.exp(min(values[key], MOST_NATS))
    for key, tag in WAITS.items():
        if key in values and values.get("step_s"):
            found[tag] = values[key] / values["step_s"]
    return found


def exact(layout: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A layout in which each tag matches itself alone: TensorBoard takes tags for regular expressions."""
    return {
        part: {title: [kind, [f"^{tag}$" for tag in tags]] for title, (kind, tags) in charts.items()}
        for part, charts in layout.items()
    }


def hyperparameters(config_yaml: str) -> Iterator[Any]:
    """Summaries that tell TensorBoard's page "hparams" the keys of a config and the tags to compare."""
    from omegaconf import OmegaConf
    from torch.utils.tensorboard.summary import hparams

    config = OmegaConf.to_container(OmegaConf.create(config_yaml))
    assert isinstance(config, dict)
    flat = flatten({key: value for key, value in config.items() if key not in WITHOUT_EFFECT})
    experiment, start, _ = hparams(flat, dict.fromkeys(COMPARED, 0.0))
    yield from (experiment, start)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values as `key.subkey`; a list is its text."""
    if not isinstance(values, dict):
        return {prefix: values if isinstance(values, (bool, int, float, str)) else str(values)}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _write_look(writer: SummaryWriter, look: Look) -> None:
    for tag, value in look.scalars.items():
        writer.add_scalar(tag, value, look.step)
    for tag, text in look.texts.items():
        writer.add_text(tag, text, look.step)
    for tag, image in look.images.items():
        writer.add_image(tag, image, look.step, dataformats="HWC")
    for tag, histogram in look.histograms.items():
        writer.add_histogram(tag, histogram, look.step, bins=64)  # type: ignore[arg-type]


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
