"""Lines that a full disk refuses, and lines of launches that died: each step is shown once."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from pretrain.run.folder import RunFolder
from pretrain.run.metric_log import Monitor


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def monitor(run: RunFolder, step: int = 0) -> Monitor:
    return Monitor(run, enabled=True, steps=9, step=step, config_yaml="a: 1")


def valid(step: int, loss: float) -> dict[str, float]:
    return {"step": step, "valid_loss": loss, "valid_accuracy": 0.0}


def points(run: RunFolder) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("valid/loss")]


def lines(run: RunFolder) -> list[tuple[int, float]]:
    return [(line["step"], line["valid_loss"]) for line in map(json.loads, run.log.read_text().splitlines())]


def test_lines_that_wait_are_written_at_the_end(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = monitor(run)
    with monkeypatch.context() as full:
        full.setattr("pretrain.run.metric_log.LogWriter.write", refuse)
        full.setattr("pretrain.run.metric_log._Board.write", refuse)
        shown.line(valid(1, 7.0))
        shown.line(valid(2, 6.0))
    assert lines(run) == []
    shown.close()
    assert lines(run) == points(run) == [(1, 7.0), (2, 6.0)]


def refuse(output: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_launch_that_died_before_its_first_checkpoint_is_not_shown(run: RunFolder) -> None:
    for last in (5.0, 4.0):
        shown = monitor(run)
        for step in range(2):
            shown.line(valid(step, last))
        shown.close()
        shown = monitor(run, step=1)
        shown.line(valid(2, last))
        shown.close()
    assert points(run) == [(0, 4.0), (1, 4.0), (2, 4.0)]
