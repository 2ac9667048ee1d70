"""Open a dataset and read its rows, in any order.

It needs NumPy and the standard library only; a dataset at a URL also needs fsspec.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.shards.cache import CachedFiles, CacheRecipe
from data_prep.shards.dataset_files import DatasetFiles, LocalFiles
from data_prep.shards.format import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    all_shards,
    check_manifest,
    check_sizes,
    damaged,
)
from data_prep.shards.shard_file import Array, Dtypes, MappedShard
from sharebert_common.errors import BadInput
from sharebert_common.files import sha256
from sharebert_common.inference_tokenizer import SPECIAL_TOKENS
from sharebert_common.remote_files import is_url, open_binary


def open_dataset(path: str | Path, cache: CacheRecipe | None = None) -> Dataset:
    """Open a dataset by its manifest. No shard is read, unless the cache copies the whole dataset first.

    Args:
        path: a folder, or a URL that fsspec knows.
        cache: read through copies on a local disk; a URL needs one.

    Raises BadInput, naming the file: no manifest, a manifest that is damaged or of another format, a missing shard
    or tokenizer, a shard of another size, another tokenizer.
    """
    remote = is_url(str(path))
    if remote and cache is None:
        raise BadInput(f"{path}: a dataset at a URL is read through a cache on local disk; give it a folder")
    file = f"{str(path).rstrip('/')}/{MANIFEST}"
    try:
        manifest = json.loads(_read_remote(file) if remote else Path(file).read_bytes())
    except FileNotFoundError as error:
        hint = "`sharebert prep` has not finished it" if Path(path).is_dir() else "no such folder"
        raise BadInput(f"{file}: no dataset here ({hint})") from error
    except BadInput:
        raise
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: not readable as JSON ({error}); make the dataset again") from error
    check_manifest(manifest, file)
    try:
        if not remote:
            check_sizes(Path(path), manifest)
        return Dataset(path, manifest, cache)
    except (KeyError, TypeError) as error:
        raise damaged(file, error) from error


class Dataset:
    """A dataset. `open_dataset` makes it.

    Attributes: `path` (of the files as they are read: in the cache, where there is one), `manifest`, `fingerprint`,
    `seq_len`, `vocab_size` (words of the tokenizer), `special_ids` (by "pad", "unk", "cls", "sep", "mask"),
    `tokenizer_path`.
    """

    def __init__(self, path: str | Path, manifest: dict[str, Any], cache: CacheRecipe | None) -> None:
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.seq_len: int = manifest["seq_len"]
        self.vocab_size: int = manifest["vocab_size"]
        self.special_ids: dict[str, int] = {key: manifest["special_ids"][key] for key in SPECIAL_TOKENS}
        self._files: DatasetFiles = LocalFiles(Path(path)) if cache is None else CachedFiles(str(path), manifest, cache)
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
        """Shards whose checksums nobody has compared yet: all, or none with a cache, which compares its copies."""
        return [shard["name"] for shard in all_shards(self.manifest)] if isinstance(self._files, LocalFiles) else []

    def verify(self, names: Sequence[str] | None = None) -> None:
        """Read every byte and compare checksums. Raises BadInput, naming the damaged file.

        Args:
            names: of shards, as the manifest has them; None: all shards, and the tokenizer.
        """
        expected = {shard["name"]: shard["sha256"] for shard in all_shards(self.manifest)}
        expected[TOKENIZER] = self.manifest["tokenizer_sha256"]
        for name in expected if names is None else names:
            with self._files.open(name) as file:
                if sha256(file) != expected[name]:
                    raise BadInput(f"{self.path / name}: damaged (its checksum is not the manifest's); copy it again")


class Split:
    """The rows of one split, numbered from 0 through its shards in manifest order.

    Attributes: `rows`, `shard_rows` (rows of each shard). Threads may share it.
    """

    def __init__(self, files: DatasetFiles, shards: list[dict[str, Any]], seq_len: int, dtypes: Dtypes) -> None:
        self.shard_rows: list[int] = [shard["rows"] for shard in shards]
        self.rows = sum(self.shard_rows)
        self._files, self._shards, self._seq_len, self._dtypes = files, shards, seq_len, dtypes
        self._first_row = np.concatenate([[0], np.cumsum(self.shard_rows, dtype=np.int64)]).astype(np.int64)
        self._open: OrderedDict[int, MappedShard] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, rows: NDArray[np.int64]) -> tuple[Array, Array]:
        """Gather rows in the order asked for.

        Args:
            rows: row numbers [n] in the split, each from 0 to `rows` - 1; they may repeat.

        Returns: tokens [n, seq_len] (uint16 or uint32) and document ids [n, seq_len] (uint8 or uint16), both copies.

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
    with open_binary(url) as file:
        return file.read()
