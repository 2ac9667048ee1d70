"""Files of labelled rows (tsv, csv, parquet, jsonl) as columns of text. Every row has every column."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from numpy.typing import NDArray
from pandas.errors import EmptyDataError, ParserError, ParserWarning

from sharebert_common.errors import BadInput, nearest

SUFFIXES = (".tsv", ".csv", ".parquet", ".jsonl")


def find_table(folder: Path, split: str) -> Path | None:
    """The file of a split in `folder`, or None. Raises BadInput if there are two."""
    found = [path for path in (folder / f"{split}{suffix}" for suffix in SUFFIXES) if path.is_file()]
    if len(found) > 1:
        raise BadInput(
            f"{folder}: both {' and '.join(path.name for path in found)} could be {split}; remove one of them"
        )
    return found[0] if found else None


class Table:
    """The rows of a file. It knows the place of each row in the file, for messages."""

    def __init__(self, where: str, frame: pandas.DataFrame, header_lines: int = 0) -> None:
        self.where, self._frame, self._header_lines = where, frame, header_lines

    def __len__(self) -> int:
        return len(self._frame)

    def place(self, row: int) -> str:
        """The name of a row in messages: its number in the file, from 1; a header line counts as a row."""
        return f"{self.where}, row {int(self._frame.index[row]) + 1 + self._header_lines}"

    def take(self, rows: NDArray[np.int64]) -> Table:
        """A table of some of its rows; they keep their places."""
        return Table(self.where, self._frame.iloc[rows], self._header_lines)

    def has(self, names: Sequence[str]) -> bool:
        """Whether a column has one of these names."""
        return any(name in self._frame.columns for name in names)

    def column(self, names: Sequence[str], key: str) -> list[str]:
        """The values of the column that has one of `names`, as text.

        Raises BadInput: there is no such column (`key` of the recipe can name another), or a row has no value in it.
        """
        columns = [str(name) for name in self._frame.columns]
        name = next((name for name in names if name in columns), None)
        if name is None:
            wanted = " or ".join(f"'{name}'" for name in names)
            raise BadInput(
                f"{self.where}: no column {wanted}{nearest(names[0], columns)} (it has {', '.join(columns)}); "
                f"name it with {key}=…; if the file has no header line, name all columns with data.header=[…]"
            )
        values = self._frame[name]
        empty = values.isna().to_numpy().nonzero()[0]
        if len(empty):
            raise BadInput(f"{self.place(int(empty[0]))}: no value in column '{name}'")
        return [_as_text(value) for value in values]


def read_table(path: Path, header: Sequence[str], wanted: Sequence[str]) -> Table:
    """Read a file by its suffix.

    Args:
        path: the file.
        header: the names of all columns, used if the first line of a text file has none of `wanted`.
        wanted: names of columns, one of which the first line of a file with a header has.

    Raises BadInput, naming the file and if possible the row: not readable, a row that is too long, no rows.
    """
    try:
        if path.suffix == ".parquet":
            table = Table(str(path), pandas.read_parquet(path))
        elif path.suffix == ".jsonl":
            frame = pandas.read_json(path, lines=True, dtype=False, encoding="utf-8")
            table = Table(str(path), frame)
        elif path.suffix in (".tsv", ".csv"):
            table = _read_text(path, header, wanted)
        else:
            raise BadInput(f"{path}: the file name must end in {', '.join(SUFFIXES)}")
    except BadInput:
        raise
    except (ParserError, ParserWarning, EmptyDataError, ValueError, OSError) as error:  # pyarrow's are ValueErrors too
        raise BadInput(f"{path}: not readable as {path.suffix[1:]} ({' '.join(str(error).split())})") from error
    if not len(table):
        raise BadInput(f"{path}: has no rows")
    return table


def _read_text(path: Path, header: Sequence[str], wanted: Sequence[str]) -> Table:
    """In tsv files a quote is a character, as in GLUE's; in csv files it encloses a field."""
    text = path.read_text(encoding="utf-8-sig")
    tabs = path.suffix == ".tsv"
    options: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"quoting": csv.QUOTE_MINIMAL}
    first_line = text.split("\n", 1)[0].rstrip("\r").split("\t" if tabs else ",")
    bare = bool(header) and not {name.strip('"') for name in first_line} & set(wanted)
    if bare and len(first_line) != len(header):
        raise BadInput(f"{path}: its first line has {len(first_line)} columns, data.header names {len(header)}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParserWarning)  # pandas would cut a row that is too long, and warn
        frame = pandas.read_csv(
            io.StringIO(text),
            header=None if bare else 0,
            names=list(header) if bare else None,
            index_col=False,
            dtype=str,
            keep_default_na=False,  # "None" and "NA" are words
            **options,
        )
    return Table(str(path), frame, header_lines=0 if bare else 1)


def _as_text(value: Any) -> str:
    """A value as text. pandas may have made floats of whole numbers: they are written without `.0`."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
