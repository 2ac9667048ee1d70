"""Copies of a dataset's files on this node's own disk: fetched once, checked, and deleted when space is needed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass

from data_prep.shards.dataset_files import OPEN_SHARDS
from data_prep.shards.format import TOKENIZER, all_shards
from sharebert_common.errors import BadInput
from sharebert_common.files import make_folders
from sharebert_common.recipe import STRICT
from sharebert_common.remote_files import ATTEMPTS, FIRST_WAIT_S, open_binary

_STAGE_THREADS = 4
_COPY_BYTES = 8 << 20


@config_dataclass(config=STRICT, kw_only=True)
class CacheRecipe:
    """Copies of shards on this node's own disk, checked by checksum and shared by all processes of the node."""

    folder: str
    """Folder of the copies; several datasets may share it."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Most bytes of copies: beyond it the shards that were not used for longest are deleted; none: all are kept."""
    stage: bool = False
    """Copy the whole dataset before the first row is read."""


class CachedFiles:
    """Files of a dataset, read through a cache that all processes of this node share. See `DatasetFiles`.

    Args:
        location: folder or URL of the dataset.
        manifest: of the dataset.
        config: see `CacheRecipe`.

    Raises BadInput: a shard larger than the cache, a file that cannot be fetched or is damaged after every attempt.
    """

    def __init__(self, location: str, manifest: Mapping[str, Any], config: CacheRecipe) -> None:
        self._location, self._max_bytes = location.rstrip("/"), config.max_bytes
        self._root = Path(config.folder)
        self.folder = self._root / manifest["fingerprint"][:16]
        self._expected = {shard["name"]: (shard["sha256"], shard["bytes"]) for shard in all_shards(manifest)}
        self._expected[TOKENIZER] = (manifest["tokenizer_sha256"], 0)
        largest = max(size for _, size in self._expected.values())
        if config.max_bytes is not None and config.max_bytes < largest:
            raise BadInput(f"cache.max_bytes: {config.max_bytes} is less than one shard ({largest} bytes)")
        # A deleted file takes space until it is unmapped, so at most as many are open as the cache may hold.
        room = (config.max_bytes or largest * OPEN_SHARDS) // max(largest, 1)
        self.open_shards = max(1, min(OPEN_SHARDS, room))
        make_folders(self.folder)
        for part in self._root.glob("*/*/.*.part"):  # of a process that was killed, or of one that still copies
            with _locked(part.with_suffix(".lock"), wait=False) as free:
                if free:
                    part.unlink(missing_ok=True)
        self.open(TOKENIZER).close()
        if config.stage:
            with ThreadPoolExecutor(_STAGE_THREADS) as pool:
                list(pool.map(lambda name: self.open(name).close(), self._expected))

    def open(self, name: str) -> BinaryIO:
        """Open the copy of a file; fetch it first where there is none."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            while True:
                try:
                    file = path.open("rb")
                    os.utime(path)
                    return file
                except FileNotFoundError:  # not fetched yet, or deleted by another process
                    self._fetch(name, path)

    def _fetch(self, name: str, path: Path) -> None:
        digest, size = self._expected[name]
        temporary = path.with_name(f".{path.name}.part")
        for attempt in range(ATTEMPTS):
            try:
                self._reserve(temporary, size)
                found = _copy(f"{self._location}/{name}", temporary)
                if found == digest:
                    with _locked(self._root / ".lock"):
                        temporary.replace(path)
                    return
            except OSError as error:
                raise BadInput(f"{self._location}/{name}: cannot be copied to {path} ({error.strerror})") from error
            finally:
                temporary.unlink(missing_ok=True)
            time.sleep(FIRST_WAIT_S * 2**attempt)
        raise BadInput(f"{self._location}/{name}: damaged (its checksum is not the manifest's), {ATTEMPTS} times")

    def _reserve(self, temporary: Path, size: int) -> None:
        """Reserve space for a file before it is fetched, so that files that other processes fetch now count too."""
        with _locked(self._root / ".lock"):
            if self._max_bytes is not None:
                self._make_room(size)
            with temporary.open("wb") as file:
                file.truncate(size)

    def _make_room(self, size: int) -> None:
        """Delete the shards that were not opened for longest. The caller holds the lock, so no other file changes."""
        held, total = [], 0
        for path in (*self._root.glob("*/*/shard-*.tar"), *self._root.glob("*/*/.shard-*.tar.part")):
            try:
                state = path.stat()
            except FileNotFoundError:  # its process gave it up meanwhile
                continue
            total += state.st_size
            if not path.name.startswith("."):
                held.append((state.st_mtime_ns, state.st_size, path))
        for _, freed, path in sorted(held):
            if total + size <= (self._max_bytes or 0):
                break
            path.unlink(missing_ok=True)
            total -= freed


def _copy(source: str, target: Path) -> str:
    """Copy a file over `target`, which exists; returns the SHA-256 of the bytes that arrived."""
    digest = hashlib.sha256()
    with open_binary(source) as incoming, target.open("r+b") as out:
        while data := incoming.read(_COPY_BYTES):
            digest.update(data)
            out.write(data)
        out.truncate()
    return digest.hexdigest()


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that other processes of this node respect; it ends with the process that holds it.

    Yields whether this process has it: without `wait`, another process may hold it.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
