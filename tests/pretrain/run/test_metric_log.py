"""Lines that a full disk refuses, and lines of launches that died: each step is shown once."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from pretrain.run.folder import RunFolder
from pretrain.run.metric_log import MetricLog


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def metric_log(run: RunFolder, step: int = 0) -> MetricLog:
    log = MetricLog(run, enabled=True, steps=9)
    log.open(step, "a: 1")
    return log


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
    shown = metric_log(run)
    with monkeypatch.context() as full:
        full.setattr("sharebert_common.run_files.LogWriter.write", refuse)
        full.setattr("pretrain.run.event_file.EventFile.write", refuse)
        shown.line(valid(1, 7.0))
        shown.line(valid(2, 6.0))
    assert lines(run) == []
    shown.close()
    assert lines(run) == points(run) == [(1, 7.0), (2, 6.0)]


def refuse(output: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_launch_that_died_before_its_first_checkpoint_is_not_shown(run: RunFolder) -> None:
    for last in (5.0, 4.0):
        shown = metric_log(run)
        for step in range(2):
            shown.line(valid(step, last))
        shown.close()
        shown = metric_log(run, step=1)
        shown.line(valid(2, last))
        shown.close()
    assert points(run) == [(0, 4.0), (1, 4.0), (2, 4.0)]


def test_a_clock_that_was_set_back_between_two_attempts_drops_no_point(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_800_000_000.0
    for attempt, back_s in enumerate((0, 3600, 7200)):
        monkeypatch.setattr(time, "time", lambda back_s=back_s: now - back_s)
        shown = metric_log(run, step=10 * attempt)
        for step in range(10 * attempt + 1, 10 * attempt + 13):  # two steps that the next attempt makes again
            shown.line(valid(step, float(attempt)))
        shown.close()
        run.cut_log(10 * attempt + 10)
    assert points(run) == [(step, float((step - 1) // 10 if step <= 30 else 2)) for step in range(1, 33)]


def test_the_log_is_durable_when_asked(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = metric_log(run)
    shown.line(valid(1, 7.0))
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(str(Path(f"/proc/self/fd/{handle}").readlink())))
    shown.sync()
    assert synced == [str(run.log)]
    shown.close()
