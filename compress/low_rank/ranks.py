"""The key `ranks` of a step: ranks of some matrices, by patterns of their names."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from sharebert_common.errors import BadInput, nearest


def named_ranks(step: str, widths: Mapping[str, int], ranks: Mapping[str, int], model: object) -> dict[str, int]:
    """The rank of each matrix whose name fits a pattern; the first pattern that fits counts.

    Args:
        step: its name in a recipe.
        widths: the smaller side of each matrix, by its name.
        ranks: by pattern.
        model: as messages name it.

    Raises BadInput: a pattern that no name fits, a rank that is not below the width.
    """
    for pattern in ranks:
        if not any(fnmatchcase(name, pattern) for name in widths):
            raise BadInput(
                f"{step}.ranks: no matrix of {model} has a name like '{pattern}'; one is {next(iter(widths))}"
                f"{nearest(pattern, widths)}"
            )
    found = {}
    for name, width in widths.items():
        fits = next((pattern for pattern in ranks if fnmatchcase(name, pattern)), None)
        if fits is None:
            continue
        found[name] = ranks[fits]
        if found[name] >= width:
            raise BadInput(f"{step}.ranks: {fits}: {found[name]} is not below the width of {name}, {width}")
    return found
