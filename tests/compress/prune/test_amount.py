"""How much of a part stays."""

from __future__ import annotations

from typing import Any

import pytest

from compress.prune.amount import amount
from compress.steps import step_of
from sharebert_common.errors import BadInput


@pytest.mark.parametrize(("given", "stays"), [(None, 12), (5, 5), (0.5, 6), (0.01, 1), (0.99, 12)])
def test_a_number_or_a_share(given: float | None, stays: int) -> None:
    assert amount("key", given, 12) == stays


@pytest.mark.parametrize("step", ["prune_structure", "prune_hidden"])
@pytest.mark.parametrize("given", [1.0, 2.0, 1.5])
def test_a_share_of_1_is_not_the_number_1(step: str, given: float) -> None:
    asked: dict[str, Any] = {step: {"columns": given}}
    with pytest.raises(BadInput, match=f"{step}: columns: {given} is no share below 1; write a number of parts"):
        step_of(asked, "steps.0")
    assert step_of({step: {"columns": 1}}, "steps.0")[1].columns == 1


@pytest.mark.parametrize("key", ["prune_structure.heads", "prune_structure.layers", "prune_hidden.hidden"])
@pytest.mark.parametrize("given", [0, -1, 0.0, -0.5, "all", [1], float("nan")])
def test_what_is_no_amount_is_one_line(key: str, given: Any) -> None:
    step, name = key.split(".")
    with pytest.raises(BadInput) as raised:
        step_of({step: {name: given}}, "steps.0")
    line = f"steps.0.{step}: {name}: {given!r} is no number of parts, 1 or more, and no share between 0 and 1"
    assert str(raised.value) == line
