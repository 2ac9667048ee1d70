"""One shard: a plain tar of blocks of rows, written once, mapped into memory to be read.

A block is three members: `000000.tokens.npy` [rows, seq_len], `000000.segments.npy` [rows, seq_len] and
`000000.json`, so that any webdataset reader takes it. Headers carry no time, owner or host.
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
"""Of tokens and of segments."""


def shard_name(split: str, number: int) -> str:
    """Path of a shard inside its dataset."""
    return f"{split}/shard-{number:06d}.tar"


def write_shard(folder: Path, name: str, blocks: Iterable[tuple[Array, Array]]) -> dict[str, Any]:
    """Write one shard: whole under its name, or absent. Whoever wants it to survive a power cut flushes it (fsync).

    Args:
        folder: the dataset.
        name: path of the shard inside it, see `shard_name`.
        blocks: (tokens, segments) pairs, both [rows, seq_len].

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
        file: the open shard; it may be closed, or deleted, afterwards.
        name: for messages.
        blocks: as the manifest has them.
        seq_len: tokens of a row.
        dtypes: of tokens and of segments.

    Raises BadInput, naming the file, where it cannot be mapped or a header is not what the manifest implies.
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
        """Copies of rows [n] of this shard: tokens and segments, both [n, seq_len].

        Raises BadInput where the file was cut since: what lies behind its end reads as zeros, or ends the process.
        """
        if self._map.size() < len(self._map):
            raise BadInput(f"{self._name}: cut to {self._map.size()} of {len(self._map)} bytes; copy it again")
        block = np.searchsorted(self._first_row, rows, side="right") - 1
        within = (rows - self._first_row[block]) * self._seq_len
        tokens, document_ids = (windows[offsets[block] + within] for windows, offsets in self._arrays)
        return tokens, document_ids


def _windows(buffer: mmap.mmap, seq_len: int, dtype: np.dtype[Any]) -> Array:
    """Every run of `seq_len` elements of the file, as rows: gathering some of them copies just those."""
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
    """Write one `.npy` member; returns the byte of the file at which the array's first element lies."""
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
