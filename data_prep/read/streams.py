"""The decompressed bytes of a file. Every failure to read becomes one clear line."""

from __future__ import annotations

import gzip
import zlib
from types import TracebackType
from typing import Any

import zstandard

from data_prep.read.sources import Input
from sharebert_common.errors import BadInput
from sharebert_common.remote_files import open_binary

_ZSTD_INPUT_BYTES = 16 << 10  # a small input may unpack to much, and all of it is held in memory
_ZSTD_WINDOW_BYTES = 1 << 31  # as `zstd --long=31` needs


class Stream:
    """Reads an input from start to end, or an uncompressed one from any offset. It is a context manager."""

    def __init__(self, item: Input) -> None:
        self._item = item
        self._raw = open_binary(item.location)
        self._read: Any = self._raw
        if item.compression == "gzip":
            self._read = gzip.GzipFile(fileobj=self._raw)
        elif item.compression == "zstd":
            self._read = _ZstdReader(self._raw)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    def seek(self, offset: int) -> None:
        """Go to an offset of an uncompressed input."""
        self._raw.seek(offset)

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end.

        Raises BadInput, naming the file, if it is truncated or damaged.
        """
        pieces = []
        try:
            while size > 0 and (piece := self._read.read(size)):
                pieces.append(piece)
                size -= len(piece)
        except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
            state = "truncated" if isinstance(error, EOFError) else "damaged"
            raise BadInput(f"{self._item.name}: {state} ({' '.join(str(error).split())}); get it again") from error
        return b"".join(pieces)


class _ZstdReader:
    """Reads Zstandard frames one after the other. Unlike for the library's own reader, a cut frame is an error."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._decompressor: Any = None
        self._input = b""
        self._buffer = b""

    def read(self, size: int) -> bytes:
        while not self._buffer:
            if not self._input:
                self._input = self._raw.read(_ZSTD_INPUT_BYTES)
                if not self._input:
                    if self._decompressor is not None:
                        raise EOFError("a Zstandard frame without its end")
                    return b""
            if self._decompressor is None:
                self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
            self._buffer = self._decompressor.decompress(self._input)
            self._input = b""
            if self._decompressor.eof:
                self._input = self._decompressor.unused_data
                self._decompressor = None
        piece, self._buffer = self._buffer[:size], self._buffer[size:]
        return piece
