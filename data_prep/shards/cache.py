"""Copies of a dataset's files on this node's own disk: fetched once, checked, and dropped when room is needed."""

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

from data_prep.files import FIRST_WAIT_S, TRIES, open_binary
from data_prep.shards.reader import TOKENIZER, CacheConfig, LocalFiles, all_shards
from sharebert_common.errors import BadInput

_STAGE_THREADS = 4
_COPY_BYTES = 8 << 20


class CachedFiles:
    """Files of a dataset, read through a cache that all processes of this node share.

    Args:
        location: folder or URL of the dataset.
        manifest: of the dataset.
        config: see `CacheConfig`.

    Raises BadInput: a shard larger than the cache, a file that cannot be fetched or arrives damaged every time.
    """

    def __init__(self, location: str, manifest: Mapping[str, Any], config: CacheConfig) -> None:
        self._location, self._max_bytes = location.rstrip("/"), config.max_bytes
        self._root = Path(config.folder)
        self.folder = self._root / manifest["fingerprint"][:16]
        self._expected = {shard["name"]: (shard["sha256"], shard["bytes"]) for shard in all_shards(manifest)}
        self._expected[TOKENIZER] = (manifest["tokenizer_sha256"], 0)
        largest = max(size for _, size in self._expected.values())
        if config.max_bytes is not None and config.max_bytes < largest:
            raise BadInput(f"cache.max_bytes: {config.max_bytes} is less than one shard ({largest} bytes)")
        # A deleted file takes room until it is unmapped: hold no more of them open than the cache may hold.
        room = (config.max_bytes or largest * LocalFiles.open_shards) // max(largest, 1)
        self.open_shards = max(1, min(LocalFiles.open_shards, room))
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self._root.glob("*/*/.*.part"):  # of a process that was killed, or one that is at work
            with _locked(part.with_suffix(".lock"), wait=False) as free:
                if free:
                    part.unlink(missing_ok=True)
        self.open(TOKENIZER).close()
        if config.stage:
            with ThreadPoolExecutor(_STAGE_THREADS) as pool:
                list(pool.map(lambda name: self.open(name).close(), self._expected))

    def open(self, name: str) -> BinaryIO:
        """Open the copy of a file, which is fetched first where there is none."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            while True:
                try:
                    file = path.open("rb")
                    os.utime(path)
                    return file
                except FileNotFoundError:  # not yet fetched, or dropped by another process since
                    self._fetch(name, path)

    def _fetch(self, name: str, path: Path) -> None:
        digest, size = self._expected[name]
        temporary = path.with_name(f".{path.name}.part")
        for attempt in range(TRIES):
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
        raise BadInput(f"{self._location}/{name}: damaged (its checksum is not the manifest's), {TRIES} times")

    def _reserve(self, temporary: Path, size: int) -> None:
        """Take room for a file before it is fetched, so that what other processes are fetching counts too."""
        with _locked(self._root / ".lock"):
            if self._max_bytes is not None:
                self._make_room(size)
            with temporary.open("wb") as file:
                file.truncate(size)

    def _make_room(self, size: int) -> None:
        """Delete the shards not opened for longest. The lock is held: no other comes, goes or becomes whole."""
        held, total = [], 0
        for path in (*self._root.glob("*/*/shard-*.tar"), *self._root.glob("*/*/.shard-*.tar.part")):
            try:
                state = path.stat()
            except FileNotFoundError:  # given up since
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
    """Copy a file over `target`, which exists; returns the SHA-256 of what came."""
    digest = hashlib.sha256()
    with open_binary(source) as incoming, target.open("r+b") as out:
        while data := incoming.read(_COPY_BYTES):
            digest.update(data)
            out.write(data)
        out.truncate()
    return digest.hexdigest()


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that other processes of this node respect; it goes with the process that holds it.

    Gives whether it is held: without `wait`, another process may hold it.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
