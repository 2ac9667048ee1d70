"""How much of a kind of part stays, as a recipe says it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from sharebert_common.errors import BadInput


def _number_or_share(value: Any) -> Any:
    """1.0 would be taken for the number 1, and 2.0 for 2."""
    if isinstance(value, float) and value >= 1:
        raise ValueError(f"{value} is no share below 1; write a number of parts without a point, or none for all")
    if not (type(value) is int and value >= 1) and not (isinstance(value, float) and 0 < value < 1):
        raise ValueError(f"{value!r} is no number of parts, 1 or more, and no share between 0 and 1")
    return value


Amount = Annotated[int | float, BeforeValidator(_number_or_share)]
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
