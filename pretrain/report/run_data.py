"""What the folder of a run says about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.run.event_file import flatten
from pretrain.run.goodput import Goodput, first_start
from pretrain.run.look import SAMPLES_TAG
from sharebert_common.errors import BadInput
from sharebert_common.run_files import EVENTS_FILE, peek_state, read_json_lines, read_log


@dataclass(frozen=True)
class RunData:
    """One run."""

    name: str
    """Folder of the run, as it was given."""
    state: dict[str, Any]
    """Of state.json."""
    config: dict[str, Any]
    """Keys of the recipe, flat: `optimizer.lr`."""
    lines: list[dict[str, Any]]
    """Of log.jsonl."""
    events: list[dict[str, Any]]
    """`time`, `step`, `text`."""
    attempts: list[dict[str, Any]]
    """Of environment.json: what each attempt ran on."""
    samples: list[tuple[int, str]]
    """Step, and the table of sentences at it, as Markdown; in order."""

    def points(self, key: str) -> list[tuple[int, float]]:
        """Step and value of the lines that have `key`."""
        return [(line["step"], line[key]) for line in self.lines if key in line]

    def last(self, key: str) -> float | None:
        """The newest value of `key` in the log; None where it has none."""
        points = self.points(key)
        return points[-1][1] if points else None

    @property
    def useful_s(self) -> float:
        """Seconds of the steps that count."""
        return Goodput(self.lines).useful_s

    @property
    def wall_s(self) -> float | None:
        """Seconds from the start of the first attempt to the last line of the log."""
        start = self.attempts[0]["time"] if self.attempts else None
        return self.lines[-1]["time"] - start if start is not None and self.lines else None

    @property
    def ranks(self) -> int:
        """Processes of the newest attempt."""
        return int(self.attempts[-1].get("ranks", 1)) if self.attempts else 1


def read_run(folder: Path) -> RunData:
    """Read a run. Raises BadInput where the folder has no log of a run."""
    lines = read_log(folder)
    if not lines:
        raise BadInput(f"{folder}: no run with a log is there (log.jsonl is missing or empty)")
    return RunData(
        name=str(folder),
        state=peek_state(folder),
        config=_config(folder / "config.yaml"),
        lines=lines,
        events=read_json_lines(folder / EVENTS_FILE),
        attempts=_attempts(folder / "environment.json"),
        samples=_samples(folder / "tensorboard"),
    )


def _config(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return flatten(OmegaConf.to_container(OmegaConf.load(path))) if path.is_file() else {}


def _attempts(path: Path) -> list[dict[str, Any]]:
    if first_start(path) is None:
        return []
    return list(json.loads(path.read_text(encoding="utf-8")))


def _samples(folder: Path) -> list[tuple[int, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return []
    board = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    board.Reload()
    tag = f"{SAMPLES_TAG}/text_summary"
    if tag not in board.Tags()["tensors"]:
        return []
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in board.Tensors(tag)]
