"""Encodings of text files: recognise those that are not UTF-8, and read those that the recipe names."""

from __future__ import annotations

import codecs
from typing import Any, Literal

from sharebert_common.encodings import marked_encoding

_ISO_2022 = (b"\x1b$B", b"\x1b$@", b"\x1b$)C", b"\x1b$A")  # how Japanese, Korean and Chinese begin in 7-bit encodings
_FEW_BYTES = 16  # odd bytes in a file that prove nothing
_ODD_SHARE = 0.01


def check_encoding(name: str) -> None:
    """Raise ValueError unless Python has a text encoding of this name."""
    try:
        known = codecs.lookup(name)._is_text_encoding and codecs.lookup(name).name != "punycode"  # for host names
        if known:  # idna and undefined decode no file
            known = codecs.getincrementaldecoder(name)("replace").decode("a b\n".encode(name), True) == "a b\n"
    except (LookupError, UnicodeError):
        known = False
    if not known:
        raise ValueError(f"encoding: {name!r} is no encoding that Python knows; for example utf-16, cp1252, gb18030")


def is_utf8(encoding: str) -> bool:
    """Whether an encoding of the recipe is UTF-8, so that files need no conversion."""
    return encoding == "auto" or codecs.lookup(encoding).name in ("utf-8", "ascii")


class Suspicion:
    """Collects the signs that a file read as UTF-8 has another encoding."""

    def __init__(self) -> None:
        self._bytes = self._nuls = self._invalid = self._escapes = 0

    def look_at(self, offset: int, data: bytes) -> str | None:
        """Look at the next bytes of the file; returns what is wrong with them, if that is so."""
        if offset == 0 and (encoding := marked_encoding(data)):
            return f"starts with the byte-order mark of {encoding}"
        self._bytes += len(data)
        self._nuls += data.count(0)
        if _too_many(self._nuls, self._bytes):
            return f"{self._nuls} of its first {self._bytes} bytes are NUL, as in UTF-16"
        self._escapes += sum(data.count(escape) for escape in _ISO_2022)
        if _too_many(self._escapes, self._bytes):
            return f"{self._escapes} escapes in its first {self._bytes} bytes switch alphabets, as in ISO-2022-JP"
        return None

    def replaced(self, text: str, data: bytes) -> str | None:
        """Look at a text that had invalid bytes; returns what is wrong with the file, if that is so."""
        self._invalid += text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
        if _too_many(self._invalid, self._bytes):
            return f"{self._invalid} characters in {self._bytes} bytes are not UTF-8"
        return None


def _too_many(odd: int, size: int) -> bool:
    return odd >= _FEW_BYTES and odd > _ODD_SHARE * size


class Utf8Reader:
    """Reads a file of another encoding as UTF-8, from start to end.

    Args:
        raw: reads the bytes of the file.
        encoding: of the file.
        errors: what happens to invalid bytes; with refuse, `read` raises UnicodeDecodeError.
    """

    def __init__(self, raw: Any, encoding: str, errors: Literal["replace", "refuse"]) -> None:
        self._raw = raw
        self._decoder = codecs.getincrementaldecoder(encoding)("strict" if errors == "refuse" else "replace")
        self._buffer = b""
        self._ended = False

    def read(self, size: int) -> bytes:
        """Up to `size` bytes of UTF-8, none at the end."""
        while not self._buffer and not self._ended:
            data = self._raw.read(size)
            self._ended = not data
            self._buffer = self._decoder.decode(data, final=self._ended).encode("utf-8", "replace")
        piece, self._buffer = self._buffer[:size], self._buffer[size:]
        return piece
