"""A table of labelled rows: columns of text, the place of each row in its file, and what happens to bad rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sharebert_common.errors import BadInput, nearest


@dataclass
class BadRows:
    """What happens to the bad rows of one file: the first one is refused, or all are skipped and counted."""

    where: str
    """The file, or a split's name on the hub."""
    skip: bool = False
    unit: str = "rows"
    places: list[str] = field(default_factory=list)
    """The places of the skipped rows."""
    first: str = ""
    """What is wrong with the first of them."""

    def found(self, place: str, problem: str) -> None:
        """Count a bad row. Raises BadInput if bad rows are refused."""
        if not self.skip:
            raise BadInput(f"{self.where}, {place}: {problem} (data.bad_rows=skip skips such {self.unit})")
        self.first = self.first or f"{place}: {problem}"
        self.places.append(place)

    def note(self) -> str:
        """The line for the user: how many rows were skipped, and what is wrong with the first of them."""
        return f"{self.where}: bad {self.unit} skipped: {len(self.places):,}; the first is {self.first}"


@dataclass(frozen=True)
class Table:
    """The columns of a file."""

    where: str
    """The file, or a split's name on the hub."""
    columns: Mapping[str, Sequence[Any]]
    """Name → one value a row; None where the row has no value."""
    places: Sequence[str]
    """For messages: `line 7` of a text file, `row 7` of others, from 1."""
    bad_rows: BadRows
    empty_lines: Sequence[int] = ()
    """Numbers of the lines without text, which are not rows."""

    def __len__(self) -> int:
        return len(self.places)

    def has(self, names: Sequence[str]) -> bool:
        """Whether a column has one of these names."""
        return any(name in self.columns for name in names)

    def column(self, names: Sequence[str], key: str) -> tuple[str, Sequence[Any]]:
        """The column that has one of `names`: its name and values.

        Raises BadInput: there is no such column; `key` of the recipe can name another one.
        """
        name = next((name for name in names if name in self.columns), None)
        if name is None:
            wanted = " or ".join(f"'{name}'" for name in names)
            raise BadInput(
                f"{self.where}: no column {wanted}{nearest(names[0], self.columns)} (it has "
                f"{', '.join(self.columns)}); name it with {key}=…; if the file has no header line, name all columns "
                "with data.header=[…]"
            )
        return name, self.columns[name]


def as_text(value: Any) -> str:
    """A label as text. A whole number may have become a float in the file: it is written without `.0`."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def is_missing(value: Any) -> bool:
    """Whether a row has no value: null, or NaN."""
    return value is None or (isinstance(value, float) and value != value)
