"""Goodput by hand: over attempts, and over steps that were lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.run.goodput import Goodput, first_start


def line(step: int, step_s: float, time: float) -> dict[str, float]:
    return {"step": step, "step_s": step_s, "time": time}


def test_goodput_is_the_time_of_steps_over_the_time_since_the_first_attempt() -> None:
    goodput = Goodput([line(10, 1.0, 120.0), {"step": 10, "valid_loss": 1.0, "time": 130.0}], started=100.0)
    assert goodput.useful_s == 10.0
    assert goodput.add(line(20, 2.0, 200.0)) == pytest.approx(30 / 100)
    assert goodput.add({"step": 20, "valid_loss": 1.0}) is None


def test_without_a_first_time_it_begins_with_the_first_line() -> None:
    goodput = Goodput([])
    assert goodput.add(line(5, 2.0, 1000.0)) == 1.0
    assert goodput.add(line(10, 2.0, 1030.0)) == pytest.approx(20 / 40)


def test_the_first_attempt_stands_in_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    assert first_start(path) is None
    path.write_text(json.dumps([{"time": 5.5}, {"time": 9.0}]))
    assert first_start(path) == 5.5
    path.write_text("[")
    assert first_start(path) is None
