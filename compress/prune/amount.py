"""How much of a kind of part stays, as a recipe says it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from sharebert_common.errors import BadInput


def _no_share_of_1(value: Any) -> Any:
    """1.0 would be taken for the number 1, and 2.0 for 2."""
    if isinstance(value, float) and value >= 1:
        raise ValueError(f"{value} is no share below 1; write a number of parts without a point, or none for all")
    return value


Amount = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)],
    BeforeValidator(_no_share_of_1),
]
"""A number of parts, or a share below 1 of those that there are."""


def amount(key: str, given: float | None, there: int) -> int:
    """How many of `there` parts stay, 1 at least; all of them where nothing is given.

    Raises BadInput, naming the key of the recipe: more than there are.
    """
    if given is None:
        return there
    found = given if isinstance(given, int) else max(1, round(given * there))
    if found > there:
        raise BadInput(f"{key}: {found} are to stay, but the model has {there}")
    return found
