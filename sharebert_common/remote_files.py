"""Read files wherever they are: on a local disk, or at any URL that fsspec knows (s3, gs, http, …).

A remote file is read in ranges. Each range is retried with back-off, so a dropped connection costs one range.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from sharebert_common.errors import BadInput

T = TypeVar("T")

RANGE_BYTES = 8 << 20
ATTEMPTS = 6
FIRST_WAIT_S = 0.5


def is_url(path: str) -> bool:
    """Whether fsspec, not the local disk, opens this path."""
    return "://" in path


def open_binary(location: str) -> BinaryIO:
    """Open a file for reading and seeking. Raises BadInput where it is missing or not readable."""
    try:
        if not is_url(location):
            return Path(location).open("rb")
        return io.BufferedReader(_RemoteFile(location), RANGE_BYTES)  # type: ignore[return-value]
    except OSError as error:
        raise BadInput(f"{location}: cannot be read ({error.strerror or error})") from error


def read_ends(location: str, size: int) -> bytes:
    """The first and the last `size` bytes of a file, or all of a shorter one. Raises BadInput."""
    try:
        with _RemoteFile(location) if is_url(location) else Path(location).open("rb") as file:
            length = file.seek(0, io.SEEK_END)
            found = b""
            for start, stop in ((0, min(size, length)), (max(size, length - size), length)):
                file.seek(start)
                found += file.read(max(0, stop - start)) or b""
            return found
    except OSError as error:
        raise BadInput(f"{location}: cannot be read ({error.strerror or error})") from error


def file_system(location: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path in it."""
    import fsspec  # 50 ms that a worker on local files does without

    fs, path = fsspec.core.url_to_fs(location)
    return fs, path


def size_bytes(info: dict[str, Any]) -> int:
    """The size in what fsspec's `info` returned. Raises BadInput where the server does not say it."""
    if info.get("size") is None:
        raise BadInput(f"{info['name']}: the server does not tell its size; download it first")
    return int(info["size"])


def retry(action: Callable[[], T], what: str) -> T:
    """Run `action`. If the network or the server fails, wait and try again, each time longer.

    Raises FileNotFoundError and PermissionError at once, BadInput naming `what` after the last attempt.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:
            if attempt + 1 == ATTEMPTS:
                raise BadInput(f"{what}: {ATTEMPTS} attempts failed, the last with: {error!r}") from error
            # Random, so that a thousand readers that were cut off together do not come back together.
            time.sleep(FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


class _RemoteFile(io.RawIOBase):
    """A remote file as a seekable stream of ranges."""

    def __init__(self, location: str) -> None:
        self._fs, self._path = file_system(location)
        self._location, self._position = location, 0
        self._size = size_bytes(retry(lambda: self._fs.info(self._path), location))

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
