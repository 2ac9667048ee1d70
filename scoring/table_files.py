"""Reading files of labelled rows: tsv, csv, parquet, jsonl.

A line ends at a line feed, with or without a carriage return before it. Other characters that Unicode calls line
separators (U+2028, U+0085, \\x1c) are part of the text.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scoring.tables import BadRows, Table
from sharebert_common.encodings import decode_utf8
from sharebert_common.errors import BadInput

SUFFIXES = (".tsv", ".csv", ".parquet", ".jsonl")
LONGEST_FIELD = 1 << 30
"""Characters of a field of a csv file; Python's own limit is 131,072."""


def find_table(folder: Path, split: str) -> Path | None:
    """The file of a split in `folder`, or None. Raises BadInput if there are two."""
    found = [path for path in (folder / f"{split}{suffix}" for suffix in SUFFIXES) if path.is_file()]
    if len(found) > 1:
        raise BadInput(f"{folder}: both {' and '.join(path.name for path in found)} could be {split}; remove one")
    return found[0] if found else None


def read_table(
    path: Path,
    header: Sequence[str],
    wanted: Sequence[str],
    *,
    skip_bad: bool = False,
    may_be_empty: bool = False,
) -> Table:
    """Read a file by its suffix.

    Args:
        path: the file.
        header: the names of all columns, used if the first line of a text file has none of `wanted`.
        wanted: names of columns, one of which the first line of a file with a header has.
        skip_bad: skip rows that cannot be read, and count them in the table's `bad_rows`.
        may_be_empty: return a table without rows where the file has a header alone.

    Raises BadInput, naming the file and if possible the row: not readable, a row that cannot be read, no rows.
    """
    bad = BadRows(str(path), skip_bad)
    try:
        if path.suffix == ".parquet":
            table = _read_parquet(path, bad)
        elif path.suffix == ".jsonl":
            table = _read_jsonl(path, bad)
        elif path.suffix in (".tsv", ".csv"):
            table = _read_fields(path, header, wanted, bad)
        else:
            raise BadInput(f"{path}: the file name must end in {', '.join(SUFFIXES)}")
    except BadInput:
        raise
    except (ValueError, OSError) as error:  # pyarrow's errors are of these types too
        raise BadInput(f"{path}: not readable as {path.suffix[1:]} ({' '.join(str(error).split())})") from error
    if not len(table) and not (may_be_empty and table.columns and not bad.places):
        raise BadInput(bad.note() if bad.places else f"{path}: has no rows")
    return table


def _read_text(path: Path) -> str:
    text = decode_utf8(path.read_bytes())
    if not text:
        raise ValueError("the file is empty")
    return text


def _read_parquet(path: Path, bad: BadRows) -> Table:
    import pyarrow.parquet

    found = pyarrow.parquet.read_table(path)
    columns = [column.to_pylist() for column in found.columns]
    places = [f"row {row}" for row in range(1, found.num_rows + 1)]
    return Table(str(path), dict(zip(_unique(found.column_names), columns, strict=True)), places, bad)


def _read_jsonl(path: Path, bad: BadRows) -> Table:
    rows: list[dict[str, Any]] = []
    places, empty = [], []
    for number, line in enumerate(_lines(_read_text(path)), 1):
        if not line.strip():
            empty.append(number)
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            bad.found(f"line {number}", f"not readable as JSON ({error})")
            continue
        if not isinstance(row, dict):
            bad.found(f"line {number}", "not an object with keys, {…}")
            continue
        rows.append(row)
        places.append(f"line {number}")
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names}, places, bad, empty)


def _read_fields(path: Path, header: Sequence[str], wanted: Sequence[str], bad: BadRows) -> Table:
    """In tsv files a quote is a character, as in GLUE's; in csv files it encloses a field.

    A row may be shorter than the header: it has no value in the last columns. It must not be longer.
    """
    text = _read_text(path)
    lines = _tsv_rows(text) if path.suffix == ".tsv" else _csv_rows(text)
    empty: list[int] = []
    names: list[str] | None = None
    rows: list[list[str]] = []
    places: list[str] = []
    for number, fields in lines:
        if isinstance(fields, str):
            bad.found(f"line {number}", fields)
        elif not fields or (len(fields) == 1 and not fields[0].strip()):
            empty.append(number)
        elif names is None and not (header and not set(fields) & set(wanted)):
            names = _unique(fields)
        else:
            if names is None:
                names = list(header)
                if len(fields) != len(names):
                    raise BadInput(f"{path}: its first line has {len(fields)} columns, data.header names {len(names)}")
            if len(fields) > len(names):
                bad.found(f"line {number}", f"{len(fields)} fields, but the file has {len(names)} columns")
            else:
                rows.append(fields)
                places.append(f"line {number}")
    columns = {
        name: [fields[column] if column < len(fields) else None for fields in rows]
        for column, name in enumerate(names or [])
    }
    return Table(str(path), columns, places, bad, empty)


def _tsv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """The number and fields of each line."""
    for number, line in enumerate(_lines(text), 1):
        yield number, line.split("\t")


def _csv_rows(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """The first line and the fields of each row, which may have several lines; or what is wrong with it."""
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            yield number, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"not readable as csv ({error})"


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _unique(names: Sequence[str]) -> list[str]:
    """Column names; the second column named `x` is `x.1`."""
    found: list[str] = []
    for name in names:
        count = sum(1 for earlier in names[: len(found)] if earlier == name)
        found.append(f"{name}.{count}" if count else name)
    return found
