"""Files wherever they are: local disk, or any URL that fsspec knows (s3, gs, http, …).

A remote file is read in ranges, each retried with back-off, so that a dropped connection costs one range.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from sharebert_common.errors import BadInput

T = TypeVar("T")

RANGE_BYTES = 8 << 20
TRIES = 6
FIRST_WAIT_S = 0.5


@dataclass(frozen=True)
class FoundFile:
    """One file: `name` without the machine's own folders, `location` that opens it, size, time of change or ETag."""

    name: str
    location: str
    bytes: int
    changed: str


def is_url(path: str) -> bool:
    """Whether fsspec, not the local disk, opens this."""
    return "://" in path


def find(pattern: str) -> list[FoundFile]:
    """The files of a path, a folder (all below it), a glob or a URL of these, sorted by name; hidden ones left out."""
    fs, path = _file_system(pattern)
    path = path.rstrip("/")
    magic = [i for i, piece in enumerate(path.split("/")) if set(piece) & set("*?[")]
    if magic:
        base = "/".join(path.split("/")[: magic[0]])
        found = retry(lambda: fs.glob(path, detail=True), pattern)
    else:
        base = path.rpartition("/")[0]
        try:
            info = retry(lambda: fs.info(path), pattern)
        except FileNotFoundError:
            return []
        found = {path: info} if info["type"] != "directory" else retry(lambda: fs.find(path, detail=True), pattern)
    files = []
    for location, info in found.items():
        name = location[len(base) :].lstrip("/")
        if info.get("islink") and Path(location).is_file():
            info = fs.info(str(Path(location).resolve()))
        if info["type"] == "file" and not any(part.startswith(".") for part in PurePosixPath(name).parts):
            changed = str(info.get("mtime") or info.get("ETag") or info.get("etag") or info.get("LastModified") or "")
            place = fs.unstrip_protocol(location) if is_url(pattern) else location
            files.append(FoundFile(name, place, _size(info), changed))
    return sorted(files, key=lambda file: file.name)


def open_binary(location: str) -> BinaryIO:
    """Open for reading and seeking. Raises BadInput where the file is missing or not readable."""
    try:
        if not is_url(location):
            return Path(location).open("rb")
        return io.BufferedReader(_RemoteFile(location), RANGE_BYTES)  # type: ignore[return-value]
    except OSError as error:
        raise BadInput(f"{location}: cannot be read ({error.strerror or error})") from error


def retry(action: Callable[[], T], what: str) -> T:
    """Run `action`; on a passing failure of network or server, wait and try again, ever longer.

    Raises FileNotFoundError and PermissionError at once, BadInput naming `what` after the last try.
    """
    for attempt in range(TRIES):
        try:
            return action()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:
            if attempt + 1 == TRIES:
                raise BadInput(f"{what}: {TRIES} tries failed, the last with: {error!r}") from error
            # Random, so that a thousand readers cut off together do not come back together.
            time.sleep(FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


class _RemoteFile(io.RawIOBase):
    """A remote file as a seekable stream of ranges."""

    def __init__(self, location: str) -> None:
        self._fs, self._path = _file_system(location)
        self._location, self._position = location, 0
        self._size = _size(retry(lambda: self._fs.info(self._path), location))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, stop = self._position, min(self._position + len(buffer), self._size)
        if start >= stop:
            return 0
        data = retry(lambda: self._range(start, stop), self._location)
        buffer[: len(data)] = data
        self._position = stop
        return len(data)

    def _range(self, start: int, stop: int) -> bytes:
        data: bytes = self._fs.cat_file(self._path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(f"asked for bytes {start} to {stop}, got {len(data)} bytes")
        return data


def _file_system(location: str) -> tuple[Any, str]:
    import fsspec  # 50 ms that a worker on local files does without

    fs, path = fsspec.core.url_to_fs(location)
    return fs, path


def _size(info: dict[str, Any]) -> int:
    if info.get("size") is None:
        raise BadInput(f"{info['name']}: the server does not tell its size; download it first")
    return int(info["size"])
