"""The dataset, format 1: what is on disk, how it is written, how it is read.

    DATASET/manifest.json  DATASET/tokenizer.json
    DATASET/train/shard-000000.tar …  DATASET/validation/shard-000000.tar …

A shard is a plain tar. A block of rows is three of its members: `000000.tokens.npy` [rows, seq_len],
`000000.segments.npy` [rows, seq_len] and `000000.json`, so that any webdataset reader takes it. The
manifest says at which byte of the shard each array's first element lies, so that this module maps the
file into memory and seeks to any row. Nothing written here depends on time, owner, host or path.

This module needs NumPy and the standard library only: whoever trains imports it and nothing else of data_prep.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import tarfile
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sharebert_recipe import BadInput, write_atomically

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")
SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}

_TAR_BLOCK = 512
_OPEN_SHARDS = 64  # memory maps that a reader keeps: far below the kernel's 65,530 a process

Array = NDArray[Any]


def shard_name(split: str, number: int) -> str:
    """Path of a shard inside its dataset."""
    return f"{split}/shard-{number:06d}.tar"


def write_shard(folder: Path, name: str, blocks: Iterable[tuple[Array, Array]]) -> dict[str, Any]:
    """Write one shard: whole under its name, or absent.

    Args:
        folder: the dataset.
        name: path of the shard inside it, see `shard_name`.
        blocks: (tokens, segments) pairs, both [rows, seq_len].

    Returns: the shard's entry in the manifest.
    """
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = []
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            out = _HashingFile(file)
            for number, (tokens, segments) in enumerate(blocks):
                key, rows = f"{number:06d}", len(tokens)
                tokens_offset = _write_array(out, f"{key}.tokens.npy", tokens)
                segments_offset = _write_array(out, f"{key}.segments.npy", segments)
                _write_member(out, f"{key}.json", [json.dumps({"rows": rows}).encode()])
                entries.append({"rows": rows, "tokens_offset": tokens_offset, "segments_offset": segments_offset})
            out.write(bytes(2 * _TAR_BLOCK))
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    rows = sum(entry["rows"] for entry in entries)
    return {"name": name, "bytes": out.size, "sha256": out.hash.hexdigest(), "rows": rows, "blocks": entries}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, with its format number and fingerprint: the mark of a whole dataset, so written last."""
    whole = {"format": FORMAT, "fingerprint": fingerprint(manifest), **manifest}
    write_atomically(folder / MANIFEST, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over all that determines which rows a training run sees: equal fingerprints, equal rows."""
    content = {key: manifest[key] for key in ("seq_len", "vocab_size", "tokenizer_sha256", "special_ids")}
    content["format"] = FORMAT
    content["shards"] = [
        [shard["name"], shard["rows"], shard["sha256"]]
        for split in SPLITS
        for shard in manifest["splits"][split]["shards"]
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset by its manifest; no shard is read.

    Raises BadInput, naming the file: no manifest, one that is damaged or of another format, a shard or a
    tokenizer that is missing, a shard of another size.
    """
    folder = Path(path)
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        hint = "`sharebert prep` has not finished it" if folder.is_dir() else "no such folder"
        raise BadInput(f"{file}: no dataset here ({hint})") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: not readable as JSON ({error}); make the dataset again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise BadInput(f"{file}: format {found!r}; this version reads format {FORMAT}")
    try:
        expected = fingerprint(manifest)
        dataset = Dataset(folder, manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{file}: damaged ({type(error).__name__}: {error}); make the dataset again") from error
    if manifest.get("fingerprint") != expected:
        raise BadInput(f"{file}: damaged (its fingerprint does not match its shards); make the dataset again")
    dataset.check_sizes()
    return dataset


class Dataset:
    """A dataset on local disk. Made by `open_dataset`.

    Attributes: `path`, `manifest`, `fingerprint`, `seq_len`, `vocab_size` (words of the tokenizer),
    `special_ids` (ids by "pad", "unk", "cls", "sep", "mask"), `tokenizer_path`.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.seq_len: int = manifest["seq_len"]
        self.vocab_size: int = manifest["vocab_size"]
        self.special_ids: dict[str, int] = {key: manifest["special_ids"][key] for key in SPECIAL_TOKENS}
        self.tokenizer_path = path / TOKENIZER
        dtypes = np.dtype(manifest["dtype"]), np.dtype(manifest["segments_dtype"])
        self._splits = {s: Split(path, manifest["splits"][s]["shards"], self.seq_len, *dtypes) for s in SPLITS}

    def split(self, name: str) -> Split:
        """The rows of "train" or "validation"."""
        if name not in self._splits:
            raise BadInput(f"{self.path}: no split '{name}' (there are: {', '.join(SPLITS)})")
        return self._splits[name]

    def check_sizes(self) -> None:
        """Raise BadInput, naming the file, where a shard or the tokenizer is missing or a shard has another size."""
        for shard in self._shards():
            file = self.path / shard["name"]
            try:
                size = file.stat().st_size
            except FileNotFoundError as error:
                raise BadInput(f"{file}: missing; copy it again or make the dataset again") from error
            if size != shard["bytes"]:
                raise BadInput(f"{file}: {size} bytes where the manifest says {shard['bytes']}; copy it again")
        if not self.tokenizer_path.is_file():
            raise BadInput(f"{self.tokenizer_path}: missing; copy it again or make the dataset again")

    def verify(self) -> None:
        """Read every byte and compare checksums; raises BadInput, naming the file that is damaged."""
        expected = {shard["name"]: shard["sha256"] for shard in self._shards()}
        expected[TOKENIZER] = self.manifest["tokenizer_sha256"]
        self.check_sizes()
        for name, digest in expected.items():
            if file_sha256(self.path / name) != digest:
                raise BadInput(f"{self.path / name}: damaged (checksum differs from the manifest's); copy it again")

    def _shards(self) -> Iterator[dict[str, Any]]:
        for split in SPLITS:
            yield from self.manifest["splits"][split]["shards"]


class Split:
    """The rows of one split, numbered from 0 through its shards in manifest order.

    Attributes: `rows`, `shard_rows` (rows of each shard). Threads may share it.
    """

    def __init__(
        self,
        path: Path,
        shards: list[dict[str, Any]],
        seq_len: int,
        dtype: np.dtype[Any],
        segments_dtype: np.dtype[Any],
    ) -> None:
        self.shard_rows: list[int] = [shard["rows"] for shard in shards]
        self.rows = sum(self.shard_rows)
        self._path, self._shards, self._seq_len = path, shards, seq_len
        self._dtype, self._segments_dtype = dtype, segments_dtype
        self._first_row = np.concatenate([[0], np.cumsum(self.shard_rows, dtype=np.int64)]).astype(np.int64)
        self._open: OrderedDict[int, _MappedShard] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, rows: NDArray[np.int64]) -> tuple[Array, Array]:
        """Gather rows in the order asked for.

        Args:
            rows: global row numbers [n], each from 0 to `rows` - 1; may repeat.

        Returns: tokens [n, seq_len] (uint16 or uint32) and segments [n, seq_len] (uint8 or uint16), both copies.

        Raises IndexError for a row that does not exist, BadInput for a damaged shard, naming the file.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.rows):
            raise IndexError(f"rows {rows.min()} to {rows.max()} asked for, of {self.rows}")
        numbers = np.searchsorted(self._first_row, rows, side="right") - 1
        touched = np.unique(numbers)
        if len(touched) == 1:
            return self._mapped(int(touched[0])).read(rows - self._first_row[touched[0]])
        tokens = np.empty((len(rows), self._seq_len), self._dtype)
        segments = np.empty((len(rows), self._seq_len), self._segments_dtype)
        for number in touched:
            here = np.flatnonzero(numbers == number)
            tokens[here], segments[here] = self._mapped(int(number)).read(rows[here] - self._first_row[number])
        return tokens, segments

    def _mapped(self, number: int) -> _MappedShard:
        with self._lock:
            shard = self._open.pop(number, None)
            if shard is None:
                entry = self._shards[number]
                shard = _MappedShard(
                    self._path / entry["name"], entry["blocks"], self._seq_len, self._dtype, self._segments_dtype
                )
            self._open[number] = shard
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
            return shard


class _MappedShard:
    """One shard mapped into memory, its headers checked."""

    def __init__(
        self,
        path: Path,
        blocks: list[dict[str, int]],
        seq_len: int,
        dtype: np.dtype[Any],
        segments_dtype: np.dtype[Any],
    ) -> None:
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise BadInput(f"{path}: cannot be read ({error}); copy it again or make the dataset again") from error
        for number, block in enumerate(blocks):
            for kind, kind_dtype in (("tokens", dtype), ("segments", segments_dtype)):
                header = _headers(f"{number:06d}.{kind}.npy", (block["rows"], seq_len), kind_dtype)
                offset = block[f"{kind}_offset"]
                if self._map[max(0, offset - len(header)) : offset] != header:
                    raise BadInput(f"{path}: damaged (header of block {number}, {kind}); copy it again")
        self._first_row = np.cumsum([0] + [block["rows"] for block in blocks])
        self._arrays = [
            (
                _windows(self._map, seq_len, kind_dtype),
                np.array([b[f"{kind}_offset"] for b in blocks]),
                kind_dtype.itemsize,
            )
            for kind, kind_dtype in (("tokens", dtype), ("segments", segments_dtype))
        ]
        self._seq_len = seq_len

    def read(self, rows: NDArray[np.int64]) -> tuple[Array, Array]:
        block = np.searchsorted(self._first_row, rows, side="right") - 1
        within = (rows - self._first_row[block]) * self._seq_len
        tokens, segments = (windows[offsets[block] // size + within] for windows, offsets, size in self._arrays)
        return tokens, segments


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
