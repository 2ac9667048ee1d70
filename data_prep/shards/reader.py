"""The dataset, format 1: what is on disk, how it is written, how it is read.

    DATASET/manifest.json  DATASET/tokenizer.json
    DATASET/train/shard-000000.tar …  DATASET/validation/shard-000000.tar …

The manifest says at which byte of a shard each array's first element lies, so that rows are read through memory
maps, in any order. It tells nothing of time, owner, host or path: what was made of the same is the same.

This module needs NumPy and the standard library only: whoever trains imports it and nothing else of data_prep.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass

from data_prep.shards.shard_file import Array, Dtypes, MappedShard, shard_name, write_shard
from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256, sha256, write_atomically
from sharebert_common.recipe import STRICT

__all__ = [
    "CacheConfig",
    "Dataset",
    "LocalFiles",
    "Split",
    "file_sha256",
    "fingerprint",
    "open_dataset",
    "shard_name",
    "write_manifest",
    "write_shard",
]

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")
SHARD_NAME = re.compile(r"(train|validation)/[\w-][\w.-]*")
SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}


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


@config_dataclass(config=STRICT, kw_only=True)
class CacheConfig:
    """Copies of shards on this node's own disk, checked by checksum, shared by all processes of the node."""

    folder: str
    """Where the copies lie; several datasets may share it."""
    max_bytes: int | None = Field(default=None, ge=1)
    """The shards that were not used for longest are deleted beyond this; none: all are kept."""
    stage: bool = False
    """Copy the whole dataset before the first row is read."""


def open_dataset(path: str | Path, cache: CacheConfig | None = None) -> Dataset:
    """Open a dataset by its manifest; no shard is read, unless the cache is to be staged.

    Args:
        path: a folder, or a URL that fsspec knows.
        cache: read through copies on local disk; a URL needs one.

    Raises BadInput, naming the file: no manifest, one that is damaged or of another format, a shard or a
    tokenizer that is missing, a shard of another size, a tokenizer that is not the dataset's.
    """
    remote = "://" in str(path)
    if remote and cache is None:
        raise BadInput(f"{path}: a dataset at a URL is read through a cache on local disk; give it a folder")
    file = f"{str(path).rstrip('/')}/{MANIFEST}"
    try:
        manifest = json.loads(_read_remote(file) if remote else Path(file).read_bytes())
    except FileNotFoundError as error:
        hint = "`sharebert prep` has not finished it" if Path(path).is_dir() else "no such folder"
        raise BadInput(f"{file}: no dataset here ({hint})") from error
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{file}: not readable as JSON ({error}); make the dataset again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise BadInput(f"{file}: format {found!r}; this version reads format {FORMAT}")
    try:
        for shard in all_shards(manifest):
            if not SHARD_NAME.fullmatch(shard["name"]):  # it becomes a path, of a copy in the cache too
                raise BadInput(f"{file}: a shard is named {shard['name']!r}, which is no file of train/ or validation/")
        expected = fingerprint(manifest)
        if not remote:
            check_sizes(Path(path), manifest)
        dataset = Dataset(path, manifest, cache)
    except (KeyError, TypeError) as error:
        raise BadInput(f"{file}: damaged ({type(error).__name__}: {error}); make the dataset again") from error
    if manifest.get("fingerprint") != expected:
        raise BadInput(f"{file}: damaged (its fingerprint does not match its shards); make the dataset again")
    return dataset


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise BadInput, naming the file: one that is missing, a shard of another size, another tokenizer."""
    for shard in all_shards(manifest):
        file = folder / shard["name"]
        try:
            size = file.stat().st_size
        except FileNotFoundError as error:
            raise BadInput(f"{file}: missing; copy it again or make the dataset again") from error
        if size != shard["bytes"]:
            raise BadInput(f"{file}: {size} bytes where the manifest says {shard['bytes']}; copy it again")
    tokenizer = folder / TOKENIZER
    if not tokenizer.is_file():
        raise BadInput(f"{tokenizer}: missing; copy it again or make the dataset again")
    if file_sha256(tokenizer) != manifest["tokenizer_sha256"]:
        raise BadInput(
            f"{tokenizer}: damaged, or not the tokenizer of this dataset (its checksum is not the manifest's); "
            "copy it again or make the dataset again"
        )


def all_shards(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries of all shards of a manifest, in order."""
    for split in SPLITS:
        yield from manifest["splits"][split]["shards"]


class Dataset:
    """A dataset. Made by `open_dataset`.

    Attributes: `path` (of the files as they are read: those of the cache, where there is one), `manifest`,
    `fingerprint`, `seq_len`, `vocab_size` (words of the tokenizer), `special_ids` (by "pad", "unk", "cls", "sep",
    "mask"), `tokenizer_path`.
    """

    def __init__(self, path: str | Path, manifest: dict[str, Any], cache: CacheConfig | None) -> None:
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.seq_len: int = manifest["seq_len"]
        self.vocab_size: int = manifest["vocab_size"]
        self.special_ids: dict[str, int] = {key: manifest["special_ids"][key] for key in SPECIAL_TOKENS}
        self._files: Files
        if cache is None:
            self._files = LocalFiles(Path(path))
        else:
            from data_prep.shards.cache import CachedFiles

            self._files = CachedFiles(str(path), manifest, cache)
        self.path = self._files.folder
        self.tokenizer_path = self.path / TOKENIZER
        dtypes = np.dtype(manifest["dtype"]), np.dtype(manifest["segments_dtype"])
        self._splits = {s: Split(self._files, manifest["splits"][s]["shards"], self.seq_len, dtypes) for s in SPLITS}

    def split(self, name: str) -> Split:
        """The rows of "train" or "validation"."""
        if name not in self._splits:
            raise BadInput(f"{self.path}: no split '{name}' (there are: {', '.join(SPLITS)})")
        return self._splits[name]

    def files_to_verify(self) -> list[str]:
        """Shards that nobody has compared with the manifest yet: all, or none where a cache does so when it copies."""
        return [shard["name"] for shard in all_shards(self.manifest)] if isinstance(self._files, LocalFiles) else []

    def verify(self, names: Sequence[str] | None = None) -> None:
        """Read every byte and compare checksums; raises BadInput, naming the file that is damaged.

        Args:
            names: of shards, as the manifest has them; none: all shards, and the tokenizer.
        """
        expected = {shard["name"]: shard["sha256"] for shard in all_shards(self.manifest)}
        expected[TOKENIZER] = self.manifest["tokenizer_sha256"]
        for name in expected if names is None else names:
            with self._files.open(name) as file:
                if sha256(file) != expected[name]:
                    raise BadInput(f"{self.path / name}: damaged (its checksum is not the manifest's); copy it again")


class Files(Protocol):
    """Where the files of a dataset come from."""

    folder: Path
    """Where they lie on this machine."""
    open_shards: int
    """How many shards a reader may hold open."""

    def open(self, name: str) -> BinaryIO:
        """Open a shard, or the tokenizer. Raises BadInput where that cannot be."""


class LocalFiles:
    """Files of a dataset that are read where they are."""

    open_shards = 64  # a map keeps its file open, and a process may have 1,024 files and 65,530 maps

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, name: str) -> BinaryIO:
        """See `Files`."""
        try:
            return (self.folder / name).open("rb")
        except OSError as error:
            raise BadInput(f"{self.folder / name}: cannot be read ({error.strerror}); copy it again") from error


class Split:
    """The rows of one split, numbered from 0 through its shards in manifest order.

    Attributes: `rows`, `shard_rows` (rows of each shard). Threads may share it.
    """

    def __init__(self, files: Files, shards: list[dict[str, Any]], seq_len: int, dtypes: Dtypes) -> None:
        self.shard_rows: list[int] = [shard["rows"] for shard in shards]
        self.rows = sum(self.shard_rows)
        self._files, self._shards, self._seq_len, self._dtypes = files, shards, seq_len, dtypes
        self._first_row = np.concatenate([[0], np.cumsum(self.shard_rows, dtype=np.int64)]).astype(np.int64)
        self._open: OrderedDict[int, MappedShard] = OrderedDict()
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
        tokens, document_ids = (np.empty((len(rows), self._seq_len), dtype) for dtype in self._dtypes)
        for number in touched:
            here = np.flatnonzero(numbers == number)
            tokens[here], document_ids[here] = self._mapped(int(number)).read(rows[here] - self._first_row[number])
        return tokens, document_ids

    def _mapped(self, number: int) -> MappedShard:
        with self._lock:
            shard = self._open.pop(number, None)
            if shard is None:
                while len(self._open) >= self._files.open_shards:
                    self._open.popitem(last=False)
                entry = self._shards[number]
                with self._files.open(entry["name"]) as file:
                    name = str(self._files.folder / entry["name"])
                    shard = MappedShard(file, name, entry["blocks"], self._seq_len, self._dtypes)
            self._open[number] = shard
            return shard


def _read_remote(url: str) -> bytes:
    from data_prep.files import open_binary

    with open_binary(url) as file:
        return file.read()
