"""What people see of a run: what it is, one line an interval that fits 100 columns, and the time left."""

from __future__ import annotations

import re

import pytest
from terminals import shown_on_a_terminal

from pretrain.plan.estimate import PLAN_DEFAULTS
from pretrain.recipe import TrainRecipe
from pretrain.run.introduction import introduction
from pretrain.run.terminal import Terminal, time_left
from sharebert_common.recipe import load


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 min 0 s"), (310.9, "5 min 10 s"), (3 * 3600 + 340, "3 h 5 min"), (51 * 3600 + 5, "2 d 3 h")],
)
def test_time_left(seconds: float, text: str) -> None:
    assert time_left(seconds) == text


def test_a_line_fits_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    line = {"step": 22_990, "loss": 10.1234, "lr": 9.99e-4, "grad_norm": 12.34, "tokens_per_s": 1_234_567.0}
    Terminal(23_000, 0).show(line | {"step_s": 8000.0})
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.endswith("  22 h 13 min left")
    assert len(shown) <= 100


def test_a_validation_has_a_bar_of_its_own_below_that_of_the_training() -> None:
    code = """
import time
from pretrain.run.terminal import Terminal
terminal = Terminal(100, 40)
for number in terminal.progress(range(8), "validation", 8):
    time.sleep(0.1)
terminal.close()
print(terminal._bar.task_ids)
"""
    printed, shown = shown_on_a_terminal(code)
    assert printed == "[0]\n"
    assert "40/100" in shown
    assert re.search(r"[1-8]/8", shown)


def test_the_first_line_says_what_the_run_is() -> None:
    recipe = load(TrainRecipe, "sharebert-small", ["steps=1000"], defaults=PLAN_DEFAULTS)
    first, second = introduction(recipe, recipe.resolve(8, needs_data=False), 400, 8).splitlines()
    assert first == "veps, 12 layers of 2048, 71.7 M parameters, bf16, ZeRO 2"
    assert second.startswith(
        f"{600 * 4000 * 128 / 1e6:,.1f} M tokens in 600 steps to go on 8 ranks; curves: tensorboard"
    )
