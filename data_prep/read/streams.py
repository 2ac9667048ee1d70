"""The bytes of a file, decompressed and as UTF-8. Every failure to read becomes one clear line."""

from __future__ import annotations

import lzma
import zlib
from types import TracebackType
from typing import Literal

import zstandard

from data_prep.read.compression import MAGIC_BYTES, decompressed, recognised, refuse_others
from data_prep.read.encodings import Utf8Reader, is_utf8
from data_prep.read.sources import Input
from sharebert_common.errors import BadInput
from sharebert_common.remote_files import is_url, open_binary


class Stream:
    """Reads an input from start to end, or a seekable one from any offset. It is a context manager.

    Raises BadInput where a file at a URL is compressed in another way than its name says.
    """

    def __init__(self, item: Input, encoding_errors: Literal["replace", "refuse"] = "replace") -> None:
        self._item = item
        self._raw = open_binary(item.location)
        if is_url(item.location):
            self._compare_compression()
        self._read = decompressed(self._raw, item.compression)
        if not is_utf8(item.encoding):
            self._read = Utf8Reader(self._read, item.encoding, encoding_errors)

    def _compare_compression(self) -> None:
        start = self._raw.read(MAGIC_BYTES)
        refuse_others(start, self._item.name)
        found = recognised(start)
        self._raw.seek(0)
        if found != self._item.compression:
            raise BadInput(
                f"{self._item.name}: its data is {found or 'not compressed'}, and its name says "
                f"{self._item.compression or 'not compressed'}; name it for what it is, or download it first"
            )

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    def seek(self, offset: int) -> None:
        """Go to an offset of a seekable input."""
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
        except UnicodeDecodeError as error:
            raise BadInput(
                f"{self._item.name}: {error.reason} (not {self._item.encoding}); repair it or set "
                "source.encoding_errors: replace"
            ) from error
        except (EOFError, OSError, zlib.error, zstandard.ZstdError, lzma.LZMAError) as error:
            state = "truncated" if isinstance(error, EOFError) else "damaged"
            raise BadInput(f"{self._item.name}: {state} ({' '.join(str(error).split())}); get it again") from error
        return b"".join(pieces)
