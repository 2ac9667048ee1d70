"""Columns of text in parquet files and in datasets of the Hugging Face hub, both read with Arrow."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from sharebert_common.errors import BadInput, nearest
from sharebert_common.remote_files import open_binary

_BATCH_ROWS = 1000


def row_group_bytes(location: str) -> list[int]:
    """Uncompressed bytes of every row group of a parquet file. Raises BadInput."""
    metadata = _parquet(location).metadata
    return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


def text_columns(location: str) -> list[str]:
    """Names of the columns of a parquet file that hold text. Raises BadInput."""
    return [field.name for field in _parquet(location).schema_arrow if _is_text(field.type)]


Texts = Iterator[tuple[int, list[bytes | None]]]
"""Batches of a column as bytes, each with the number of its first row (from 0)."""


def parquet_texts(location: str, key: str, start: int = 0, stop: int | None = None) -> Texts:
    """The column `key` of row groups `start` to `stop`. Raises BadInput."""
    import pyarrow as pa

    file = _parquet(location)
    _check_column(location, key, file.schema_arrow.names)
    try:
        groups = list(range(start, file.num_row_groups if stop is None else stop))
        row = sum(file.metadata.row_group(group).num_rows for group in range(start))
        batches = file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[key], use_threads=False)
        for batch in batches:
            yield row, _as_bytes(location, key, batch.column(0))
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{location}: damaged parquet ({' '.join(str(error).split())})") from error


@lru_cache(maxsize=1)
def hub_table(hub: str, config: str | None, split: str) -> Any:
    """The Arrow table of a hub dataset (or of a folder that `datasets` reads), memory-mapped. Raises BadInput."""
    import datasets
    from datasets.exceptions import DatasetsError

    saved = (Path(hub) / "state.json").is_file()
    if not saved and Path(hub).is_dir() and glob.has_magic(str(Path(hub).resolve())):  # it resolves links itself
        raise BadInput(
            f"source.hub: {Path(hub).resolve()}: `datasets` takes [, ], * and ? in it for a pattern; rename it, "
            "or give its files to source.paths"
        )
    try:
        if saved:
            return datasets.Dataset.load_from_disk(hub).data.table
        return datasets.load_dataset(hub, config, split=split).data.table
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        said = " ".join(str(error.__cause__ or error).split())[:400]
        hint = "; it is a folder: give it to source.paths, which reads one key" if Path(hub).is_dir() else ""
        raise BadInput(f"source.hub: {hub}: {said}{hint}") from error


def table_texts(name: str, table: Any, key: str, start: int, stop: int) -> Texts:
    """The column `key` of rows `start` to `stop`. Raises BadInput."""
    _check_column(name, key, table.column_names)
    column = table.column(key)
    for first in range(start, stop, _BATCH_ROWS):
        row = first
        for chunk in column.slice(first, min(_BATCH_ROWS, stop - first)).chunks:
            yield row, _as_bytes(name, key, chunk)
            row += len(chunk)


def _parquet(location: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        # Buffered, not pre-buffered, so that a row group of gigabytes is read page by page.
        return pa.parquet.ParquetFile(open_binary(location), buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{location}: not readable as parquet ({' '.join(str(error).split())})") from error


def _check_column(name: str, key: str, columns: list[str]) -> None:
    if key not in columns:
        raise BadInput(f"{name}: no column '{key}'{nearest(key, columns)}; set source.text_key (it has {columns})")


def _is_text(arrow_type: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    # arrow-rs and DataFusion write strings as views.
    views = pa.types.is_string_view(arrow_type)
    return bool(pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or views)


def _as_bytes(name: str, key: str, column: Any) -> list[bytes | None]:
    import pyarrow as pa

    if not _is_text(column.type):
        raise BadInput(f"{name}: column '{key}' holds {column.type}, not text; set source.text_key")
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # As bytes, because the caller decides about invalid UTF-8.
    return column.cast(pa.large_binary()).to_pylist()  # type: ignore[no-any-return]
