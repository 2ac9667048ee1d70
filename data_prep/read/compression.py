"""Compressed files: recognised by their first bytes, whatever their name, and read from start to end."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import PurePosixPath
from typing import Any, Literal

import zstandard

from sharebert_common.errors import BadInput
from sharebert_common.remote_files import is_url, open_binary

Compression = Literal["gzip", "zstd", "xz", "bzip2"]

COMPRESSION_SUFFIXES: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}

MAGIC_BYTES = 10
"""How many of the first bytes tell the compression."""

_NOT_READ = {
    "lz4": (b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18"),
    "snappy": (b"\xff\x06\x00\x00sNaP",),
    "lzip": (b"LZIP\x00", b"LZIP\x01"),
    "lzop": (b"\x89LZO\x00\r\n\x1a\n",),
    "lzma": tuple(b"\x5d" + (1 << bits).to_bytes(4, "little") for bits in range(18, 27)),  # by the dictionary's size
    "compress": (b"\x1f\x9d",),
    "zip": (b"PK\x03\x04", b"PK\x05\x06"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c",),
    "RAR": (b"Rar!\x1a\x07",),
}
"""How files begin that are compressed in a way that is not read here."""

_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # a block of data, or the end of an empty file
_ZSTD_INPUT_BYTES = 16 << 10  # a small input may unpack to much, and all of it is held in memory
_ZSTD_WINDOW_BYTES = 1 << 31  # as `zstd --long=31` needs


def compression_of(location: str, name: str) -> Compression | None:
    """How a file is compressed. At a URL its name tells, without a request; `Stream` then compares the first bytes.

    Raises BadInput for a compression that is not read here.
    """
    if is_url(location):
        return COMPRESSION_SUFFIXES.get(PurePosixPath(name).suffix.lower())
    with open_binary(location) as file:
        start = file.read(MAGIC_BYTES)
    refuse_others(start, name)
    return recognised(start)


def refuse_others(start: bytes, name: str) -> None:
    """Raise BadInput where a file that starts with these bytes is compressed in a way that is not read here."""
    for compression, starts in _NOT_READ.items():
        if start.startswith(starts):
            known = ", ".join(COMPRESSION_SUFFIXES.values())
            raise BadInput(
                f"{name}: it is compressed with {compression}, which prep does not read; unpack it ({known} are read)"
            )


def recognised(start: bytes) -> Compression | None:
    """The compression of data that starts with these bytes."""
    if start.startswith(b"\x1f\x8b"):
        return "gzip"
    if start.startswith(b"\x28\xb5\x2f\xfd") or (start[1:4] == b"\x2a\x4d\x18" and 0x50 <= start[0] <= 0x5F):
        return "zstd"
    if start.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    if start.startswith(b"BZh") and start[4:10] in _BZIP2_BLOCKS:
        return "bzip2"
    return None


def decompressed(raw: Any, compression: Compression | None) -> Any:
    """A reader of the decompressed bytes of an open file. Errors and truncation raise what the library raises."""
    match compression:
        case "gzip":
            return gzip.GzipFile(fileobj=raw)
        case "zstd":
            return _ZstdReader(raw)
        case "xz":
            return lzma.LZMAFile(raw)
        case "bzip2":
            return bz2.BZ2File(raw)
    return raw


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
