"""One shard: a plain tar of blocks of rows, written once and mapped into memory to be read.

A block is three members: `000000.tokens.npy` [rows, seq_len], `000000.segments.npy` [rows, seq_len] (the document
ids) and `000000.json`, so any webdataset reader can read it. Headers hold no time, owner or host.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import secrets
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sharebert_common.errors import BadInput

_TAR_BLOCK = 512

Array = NDArray[Any]
Dtypes = tuple["np.dtype[Any]", "np.dtype[Any]"]
"""Of tokens and of document ids."""


def write_shard(folder: Path, name: str, blocks: Iterable[tuple[Array, Array]]) -> dict[str, Any]:
    """Write one shard. It is complete under its name, or absent; the caller flushes it if it must survive a power cut.

    Args:
        folder: the dataset.
        name: path of the shard inside it, see `shard_name`.
        blocks: (tokens, document ids) pairs, both [rows, seq_len].

    Returns: the shard's entry in the manifest.
    """
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = []
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            out = _HashingFile(file)
            for number, (tokens, document_ids) in enumerate(blocks):
                key, rows = f"{number:06d}", len(tokens)
                tokens_offset = _write_array(out, f"{key}.tokens.npy", tokens)
                segments_offset = _write_array(out, f"{key}.segments.npy", document_ids)
                _write_member(out, f"{key}.json", [json.dumps({"rows": rows}).encode()])
                entries.append({"rows": rows, "tokens_offset": tokens_offset, "segments_offset": segments_offset})
            out.write(bytes(2 * _TAR_BLOCK))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    rows = sum(entry["rows"] for entry in entries)
    return {"name": name, "bytes": out.size, "sha256": out.hash.hexdigest(), "rows": rows, "blocks": entries}


class MappedShard:
    """One shard mapped into memory.

    Args:
        file: the open shard; the caller may close or delete it afterwards.
        name: of the file, for error messages.
        blocks: as the manifest has them.
        seq_len: tokens of a row.
        dtypes: of tokens and of document ids.

    Raises BadInput, naming the file, where it cannot be mapped or a header does not fit the manifest.
    """

    def __init__(self, file: BinaryIO, name: str, blocks: list[dict[str, int]], seq_len: int, dtypes: Dtypes) -> None:
        try:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise BadInput(f"{name}: cannot be read ({error}); copy it again or make the dataset again") from error
        kinds = tuple(zip(("tokens", "segments"), dtypes, strict=True))
        for number, block in enumerate(blocks):
            for kind, dtype in kinds:
                header = _headers(f"{number:06d}.{kind}.npy", (block["rows"], seq_len), dtype)
                offset = block[f"{kind}_offset"]
                if self._map[max(0, offset - len(header)) : offset] != header:
                    raise BadInput(f"{name}: damaged (header of block {number}, {kind}); copy it again")
        self._name, self._seq_len = name, seq_len
        self._first_row = np.cumsum([0] + [block["rows"] for block in blocks])
        self._arrays = [
            (_windows(self._map, seq_len, dtype), np.array([b[f"{kind}_offset"] for b in blocks]) // dtype.itemsize)
            for kind, dtype in kinds
        ]

    def read(self, rows: NDArray[np.int64]) -> tuple[Array, Array]:
        """Copies of rows [n] of this shard: tokens and document ids, both [n, seq_len].

        Raises BadInput where the file was cut after it was mapped: a read behind its end gives zeros or a bus error.
        """
        if self._map.size() < len(self._map):
            raise BadInput(f"{self._name}: cut to {self._map.size()} of {len(self._map)} bytes; copy it again")
        block = np.searchsorted(self._first_row, rows, side="right") - 1
        within = (rows - self._first_row[block]) * self._seq_len
        tokens, document_ids = (windows[offsets[block] + within] for windows, offsets in self._arrays)
        return tokens, document_ids


def _windows(buffer: mmap.mmap, seq_len: int, dtype: np.dtype[Any]) -> Array:
    """Every run of `seq_len` elements of the file as a row: to gather some rows copies these rows only."""
    flat = np.frombuffer(buffer, dtype, count=len(buffer) // dtype.itemsize)
    return np.lib.stride_tricks.sliding_window_view(flat, seq_len)


class _HashingFile:
    """A file opened for writing that knows its size and SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.size += memoryview(data).nbytes


def _write_array(out: _HashingFile, name: str, array: Array) -> int:
    """Write one `.npy` member; returns the offset in the file of the array's first element."""
    start = out.size + _TAR_BLOCK + len(_npy_header(array.shape, array.dtype))
    _write_member(
        out, name, [_npy_header(array.shape, array.dtype), memoryview(np.ascontiguousarray(array).data).cast("B")]
    )
    return start


def _write_member(out: _HashingFile, name: str, pieces: list[bytes | memoryview]) -> None:
    size = sum(len(piece) for piece in pieces)
    for piece in (_tar_header(name, size), *pieces, bytes(-size % _TAR_BLOCK)):
        out.write(piece)


def _headers(name: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> bytes:
    npy = _npy_header(shape, dtype)
    return _tar_header(name, len(npy) + shape[0] * shape[1] * dtype.itemsize) + npy


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)  # its defaults: no owner, no time
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()
