"""How much of a kind of part stays, as a recipe says it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sharebert_common.errors import BadInput

Amount = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]
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
