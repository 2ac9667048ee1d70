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
