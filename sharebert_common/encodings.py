"""Bytes of a text file as text: UTF-8, and a clear line for what is not."""

from __future__ import annotations

import codecs

MARKS = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # before UTF-16, whose little-endian mark it starts with
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
"""Byte-order marks of encodings that are not UTF-8."""


def marked_encoding(data: bytes) -> str | None:
    """The encoding, other than UTF-8, whose byte-order mark the bytes start with."""
    return next((name for name, marks in MARKS.items() if data.startswith(marks)), None)


def decode_utf8(data: bytes) -> str:
    """The text of a whole UTF-8 file, without a byte-order mark.

    Raises ValueError that says what the file looks like, and how to convert it.
    """
    encoding = marked_encoding(data)
    if encoding is None and data.count(0) > len(data) // 10:
        encoding = "UTF-32" if data.count(0) > len(data) // 2 else "UTF-16"
    if encoding is not None:
        raise ValueError(f"it looks like {encoding}, and must be UTF-8; convert it: iconv -f {encoding} -t UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"byte 0x{data[error.start]:02x} on line {line} is not UTF-8; convert it, for instance from Latin-1: "
            "iconv -f LATIN1 -t UTF-8"
        ) from error
