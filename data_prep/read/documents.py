"""Read the documents of one part from files and tables, in memory that does not grow with the input.

A range of a file holds the documents that begin in it. Two neighbouring ranges find the boundary between them by the
same rule, so no document is lost or read twice.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import orjson
from numpy.typing import NDArray

from data_prep.read import tables
from data_prep.read.encodings import Suspicion, is_utf8
from data_prep.read.sources import Input, Part, Piece, SourceRecipe
from data_prep.read.streams import Stream
from sharebert_common.errors import BadInput

READ_BYTES = 4 << 20

_BLANK_LINES = re.compile(rb"\n[ \t\r]*\n")
_SURROGATES = re.compile("[\ud800-\udfff]")
_BOM = b"\xef\xbb\xbf"
_JSON_TYPES = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    str: "a string",
}


@dataclass(frozen=True)
class Batch:
    """Some documents of a part, in order, with their numbers [n] in the part."""

    numbers: NDArray[np.int64]
    texts: list[str]


def read_part(part: Part, inputs: Sequence[Input], config: SourceRecipe, counts: Counter[str]) -> Iterator[Batch]:
    """The documents of a part, a few megabytes at a time, without empty ones.

    Adds to `counts`: documents_in and bytes_in (of their text in UTF-8), invalid_utf8 (documents repaired),
    bad_documents and long_documents (documents skipped), splits (cuts in long documents).

    Raises BadInput, naming file and place, for what cannot be read and for what the config refuses.
    """
    first = 0
    for piece in part:
        for texts in _Reader(inputs[piece.input], config, counts).read(piece):
            kept = [text for text in texts if text and not text.isspace()]
            counts["documents_in"] += len(kept)
            counts["bytes_in"] += utf8_bytes(kept)
            yield Batch(np.arange(first, first + len(kept)), kept)
            first += len(kept)


def utf8_bytes(texts: Sequence[str]) -> int:
    """Bytes of the texts in UTF-8."""
    return sum(len(text) if text.isascii() else len(text.encode()) for text in texts)


class _Reader:
    """Reads pieces of one input."""

    def __init__(self, item: Input, config: SourceRecipe, counts: Counter[str]) -> None:
        self.item, self.config, self.counts = item, config, counts
        self._suspicion = Suspicion() if item.encoding == "auto" else None
        self._is_converted = item.kind in ("text", "jsonl") and not is_utf8(item.encoding)
        self._separators = (b"\n\n", b"\n\r\n") if self._is_text and config.document == "paragraph" else (b"\n",)

    def _opened(self) -> Stream:
        return Stream(self.item, self.config.encoding_errors)

    @property
    def _is_text(self) -> bool:
        return self.item.kind == "text"

    def read(self, piece: Piece) -> Iterator[list[str]]:
        for texts in self._texts(piece):
            if self._is_converted:  # the stream has replaced invalid bytes, without a trace of where
                self.counts["invalid_utf8"] += sum("\ufffd" in text for text in texts)
            yield texts

    def _texts(self, piece: Piece) -> Iterator[list[str]]:
        if self.item.kind in ("parquet", "hub"):
            yield from self._columns(piece)
        elif self._is_text and self.config.document == "file":
            for offset, data in self._whole(piece):
                self._refuse_other_encodings(offset, data)
                yield [self._decode(data.removeprefix(_BOM) if not offset else data, offset)]
        else:
            for offset, block in self._blocks(piece):
                self._refuse_other_encodings(offset, block)
                if not offset and block.startswith(_BOM):
                    offset, block = len(_BOM), block[len(_BOM) :]
                texts = self._text_records(offset, block) if self._is_text else self._json_lines(offset, block)
                block = b""
                yield texts

    def _columns(self, piece: Piece) -> Iterator[list[str]]:
        key, source = self.config.text_key, self.config
        if self.item.kind == "parquet":
            batches = tables.parquet_texts(self.item.location, key, piece.start, piece.stop)
        else:
            table = tables.hub_table(self.item.location, source.hub_config, source.hub_split)
            batches = tables.table_texts(self.item.name, table, key, piece.start, piece.stop)
        for first, batch in batches:
            texts = []
            for row, value in enumerate(batch, first + 1):
                if value is None:
                    self._bad(f"'{key}' is null, not text", place=f"row {row}")
                elif not self._too_long(len(value)):
                    texts.append(self._decode(value))
            yield texts

    def _whole(self, piece: Piece) -> Iterator[tuple[int, bytes]]:
        """A text file that is one document: (offset, bytes), cut at whitespace near each multiple of the stride."""
        stride, window = self.config.stride_bytes, self.config.cut_window
        nominal, ahead, carry = piece.start, b"", b""
        with self._opened() as stream:
            if nominal:
                stream.seek(nominal - window)
                before = stream.read(window)
                carry = before[self._cut(before) :]
            offset = nominal - len(carry)
            while True:
                data = carry + ahead + stream.read(stride - len(ahead))
                nominal += stride
                ahead = stream.read(1)
                if not ahead:
                    yield offset, data
                    return
                cut = self._cut(data)
                self.counts["splits"] += 1
                carry, data = data[cut:], data[:cut]
                yield offset, data
                if nominal >= piece.stop and self.item.seekable:
                    return
                offset += cut

    def _blocks(self, piece: Piece) -> Iterator[tuple[int, bytes]]:
        """Whole lines or paragraphs, a few megabytes at a time: (offset, bytes)."""
        limit = self.config.max_document_bytes
        with self._opened() as stream:
            offset, stop = 0, None
            if self.item.seekable:
                offset, stop = self._boundary(stream, piece.start), self._boundary(stream, piece.stop)
                stream.seek(offset)
            position, carry, skipping = offset, b"", False
            while data := stream.read(READ_BYTES if stop is None else min(READ_BYTES, stop - position)):
                position += len(data)
                buffer = carry + data
                if skipping:  # the rest of a line that is too long
                    end = buffer.find(b"\n") + 1
                    offset += end or len(buffer)
                    buffer, skipping = buffer[end:] if end else b"", not end
                cut = max(buffer.rfind(s) + len(s) if s in buffer else 0 for s in self._separators)
                # No reference to a yielded block is kept: it may be one large document, whose processing takes memory.
                whole, carry = [buffer[:cut]], buffer[cut:]
                del data, buffer
                if cut:
                    yield offset, whole.pop()
                offset += cut
                if len(carry) > limit and not self._is_text:
                    self._too_long(len(carry), offset)
                    offset, carry, skipping = offset + len(carry), b"", True
                while len(carry) > limit:
                    cut = self._cut(carry[:limit])
                    self.counts["splits"] += 1
                    yield offset, carry[:cut]
                    offset, carry = offset + cut, carry[cut:]
            whole = [carry]
            del carry
            if whole[0]:
                yield offset, whole.pop()

    def _boundary(self, stream: Stream, nominal: int) -> int:
        """The offset at which the first document after `nominal` begins; in a long text, a cut near its limit."""
        if nominal <= 0 or nominal >= self.item.bytes:
            return nominal
        base, tail = nominal - 1, b""
        stream.seek(base)
        while data := stream.read(self.config.cut_window):
            buffer = tail + data
            ends = [buffer.find(s) + len(s) for s in self._separators if s in buffer]
            if ends:
                return base + min(ends)
            if self._is_text and base + len(buffer) - nominal > self.config.max_document_bytes:
                self.counts["splits"] += 1
                return base + self._cut(buffer)
            tail = buffer[-2:]
            base += len(buffer) - len(tail)
        return self.item.bytes

    def _text_records(self, offset: int, block: bytes) -> list[str]:
        records = block.split(b"\n") if self.config.document == "line" else _BLANK_LINES.split(block)
        texts, at = [], 0
        for record in records:
            at = block.find(record, at)
            while len(record) > self.config.max_document_bytes:
                cut = self._cut(record[: self.config.max_document_bytes])
                self.counts["splits"] += 1
                texts.append(self._decode(record[:cut], offset + at))
                record, at = record[cut:], at + cut
            texts.append(self._decode(record.strip(b"\r\n"), offset + at))
            at += len(record)
        return texts

    def _json_lines(self, offset: int, block: bytes) -> list[str]:
        key, texts = self.config.text_key, []
        lines = block.split(b"\n")
        may_be_long = len(block) > self.config.max_document_bytes
        for number, line in enumerate(lines):
            if not line:
                continue
            try:
                text = orjson.loads(line)[key]
            except (ValueError, KeyError, TypeError):
                text = None
            if type(text) is not str:
                text = self._odd_json_line(line, offset + sum(len(before) + 1 for before in lines[:number]))
            if text is not None and not (may_be_long and self._too_long(len(line), offset)):
                texts.append(text)
        return texts

    def _odd_json_line(self, line: bytes, offset: int) -> str | None:
        """The text of a line that orjson refuses, with invalid UTF-8 and lone surrogates repaired, or None."""
        if not line.strip():
            return None
        decoded = self._decode(line, offset)
        try:
            value = json.loads(decoded)
        except (ValueError, RecursionError) as error:
            self._bad(f"not JSON ({error})", offset)
            return None
        key = self.config.text_key
        text = value.get(key) if isinstance(value, dict) else None
        if not isinstance(text, str):
            if not isinstance(value, dict):
                what = f"no text under '{key}' (it is {_JSON_TYPES[type(value)]}, not an object)"
            elif key not in value:
                what = f"no text under '{key}' (its keys: {', '.join(value)})"
            else:
                what = f"'{key}' is {_JSON_TYPES[type(text)]}, not text"
            self._bad(what, offset)
            return None
        repaired = _SURROGATES.sub("\ufffd", text)
        if repaired != text:
            self._invalid_utf8("lone surrogate in a JSON string", offset)
        return repaired

    def _decode(self, data: bytes, offset: int | None = None) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            place = None if offset is None else offset + error.start
            self._invalid_utf8(f"byte 0x{data[error.start]:02x} is not UTF-8", place)
            text = data.decode(errors="replace")
            if self._suspicion and (sign := self._suspicion.replaced(text, data)):
                self._refuse_encoding(sign)
            return text

    def _invalid_utf8(self, what: str, offset: int | None) -> None:
        if self.config.encoding_errors == "refuse":
            raise BadInput(f"{self._place(offset)}: {what}; repair it or set source.encoding_errors: replace")
        self.counts["invalid_utf8"] += 1

    def _refuse_other_encodings(self, offset: int, data: bytes) -> None:
        if self._suspicion and (sign := self._suspicion.look_at(offset, data)):
            self._refuse_encoding(sign)

    def _refuse_encoding(self, sign: str) -> None:
        raise BadInput(
            f"{self.item.name}: {sign}; convert it to UTF-8, name its encoding in source.encoding, or set "
            "source.encoding: utf-8 to read it as it is"
        )

    def _bad(self, what: str, offset: int | None = None, place: str | None = None) -> None:
        if self.config.bad_documents == "refuse":
            where = f"{self.item.name}, {place}" if place else self._place(offset)
            raise BadInput(f"{where}: {what}; repair it or set source.bad_documents: skip")
        self.counts["bad_documents"] += 1

    def _too_long(self, size: int, offset: int | None = None) -> bool:
        limit = self.config.max_document_bytes
        if size <= limit:
            return False
        if self.config.long_documents == "refuse":
            raise BadInput(
                f"{self._place(offset)}: a document of {size} bytes or more, over source.max_document_bytes ({limit}); "
                "raise it or set source.long_documents: skip"
            )
        self.counts["long_documents"] += 1
        return True

    def _place(self, offset: int | None) -> str:
        if offset is None:
            return self.item.name
        with self._opened() as stream:
            line = 1
            while offset > 0 and (data := stream.read(min(READ_BYTES, offset))):
                line += data.count(b"\n")
                offset -= len(data)
        return f"{self.item.name}, line {line}"

    def _cut(self, data: bytes) -> int:
        """Where to cut, so that `data[:cut]` ends with the last whitespace, or at least with a complete character."""
        tail = max(0, len(data) - self.config.cut_window)
        cut = max(data.rfind(space, tail) for space in (b" ", b"\n", b"\t", b"\r")) + 1
        if cut:
            return cut
        cut = len(data)
        while cut > 1 and len(data) - cut < 4 and data[cut - 1] & 0xC0 == 0x80:
            cut -= 1
        return cut - 1 if data[cut - 1] >= 0xC0 else len(data)
