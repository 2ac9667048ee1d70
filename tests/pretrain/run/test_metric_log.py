"""Lines that a full disk refuses, and lines of launches that died: each step is shown once."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from pretrain.run.folder import RunFolder
from pretrain.run.look import Look
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


def points(run: RunFolder, tag: str = "valid/loss") -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.tensorboard))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


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


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("refused", ["the validation", "all of the step", "the look"])
def test_a_write_that_fails_drops_no_point_of_its_step_that_was_written_before(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    shown = metric_log(run)
    steps = range(1, 4)
    look = Look(step=2, scalars={"weights/norm_E": 3.0})
    for step in steps:
        with monkeypatch.context() as full:
            if step == 2 and refused == "all of the step":
                full.setattr("pretrain.run.event_file.scalars", refuse)
            shown.line({"step": step, "loss": 8.0 - step, "lr": 0.1, "grad_norm": 1.0, "tokens_per_s": 1.0})
            if step == 2 and refused == "the validation":
                full.setattr("pretrain.run.event_file.scalars", refuse)
            shown.line(valid(step, 9.0 - step))
            if step == 2:
                if refused == "the look":
                    full.setattr("pretrain.run.event_file._write_look", refuse)
                shown.look(look)
    shown.close()
    assert points(run, "train/loss") == [(step, 8.0 - step) for step in steps]
    assert points(run) == [(step, 9.0 - step) for step in steps]
    assert points(run, "weights/norm_E") == [(2, 3.0)]


def test_a_write_that_fails_after_a_resume_drops_no_point_of_the_attempt_before(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = metric_log(run)
    first.line(valid(1, 7.0))
    first.close()
    second = metric_log(run, step=1)
    with monkeypatch.context() as full:
        full.setattr("pretrain.run.event_file._write_look", refuse)
        second.look(Look(step=1, scalars={"weights/norm_E": 3.0}))
    second.close()
    assert points(run) == [(1, 7.0)]
    assert points(run, "weights/norm_E") == [(1, 3.0)]


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
