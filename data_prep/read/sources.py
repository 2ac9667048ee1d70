"""The inputs of a recipe, and their division into parts by bytes.

The parts are a pure function of the inputs and the recipe, never of the number of workers. So the dataset is the same,
byte for byte, on any number of machines.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

import xxhash
from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass

from data_prep.progress import say
from data_prep.read import tables
from data_prep.read.compression import COMPRESSION_SUFFIXES, Compression, compression_of
from data_prep.read.encodings import check_encoding, is_utf8
from data_prep.read.find import FoundFile, LeftOut, find, state_of
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT
from sharebert_common.remote_files import is_url, read_ends

Kind = Literal["text", "jsonl", "parquet", "hub"]

_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_DIGEST_BYTES = 1 << 20
_PARTS = 64  # enough for the cores of one machine with a small corpus …
_PART_BYTES = (4 << 20, 256 << 20)  # … and for a large corpus: to lose a part costs minutes, not hours


@config_dataclass(config=STRICT, kw_only=True)
class SourceRecipe:
    """Where documents come from, and what happens to those that cannot be read."""

    paths: str | list[str] = Field(default_factory=list)
    """Files, folders, globs or fsspec URLs: .txt, .jsonl (each also compressed: .gz, .zst, .xz, .bz2) and .parquet."""
    hub: str | None = None
    """Name of a dataset on the Hugging Face hub, or a folder that `datasets` can load; use it instead of paths."""
    hub_config: str | None = None
    """Configuration name of the hub dataset."""
    hub_split: str = "train"
    """Split of the hub dataset, as `datasets` writes it, for example `train[:10%]`."""
    text_key: str = "text"
    """Key (jsonl) or column (parquet, hub) that holds the text of a document."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """Format of the files; auto takes it from their names."""
    document: Literal["file", "line", "paragraph"] = "file"
    """What one document of a text file is: the whole file, a line, or a block between blank lines."""
    encoding: str = "auto"
    """Encoding of text and jsonl files: auto is UTF-8, but refuses files that look like another; utf-8 takes them."""
    encoding_errors: Literal["replace", "refuse"] = "replace"
    """What happens to bytes that are invalid in the encoding: replace puts U+FFFD and counts them, refuse stops."""
    bad_documents: Literal["refuse", "skip"] = "refuse"
    """What happens to a line that is not JSON and to a document without text: refuse stops, skip counts it."""
    max_document_bytes: int = Field(default=64 << 20, ge=1 << 10)
    """Most bytes of a document: a longer one of a text file is split at whitespace; others see long_documents."""
    long_documents: Literal["refuse", "skip"] = "refuse"
    """What happens to a jsonl or parquet document over max_document_bytes: refuse stops, skip counts it."""

    def __post_init__(self) -> None:
        if self.paths and self.hub:
            raise ValueError("paths and hub are both given; take one back with source.paths=[] or source.hub=null")
        if not (self.paths or self.hub):
            raise ValueError("give paths, or hub")
        if self.encoding != "auto":
            check_encoding(self.encoding)

    @property
    def cut_window(self) -> int:
        """How many bytes before the limit a long text is searched for whitespace, to cut it there."""
        return min(64 << 10, self.max_document_bytes // 4)

    @property
    def stride_bytes(self) -> int:
        """A text file that is one document is cut near multiples of this, so that no piece is over the limit."""
        return self.max_document_bytes - self.cut_window


@dataclass(frozen=True)
class Input:
    """One file or hub dataset that documents come from."""

    name: str
    """Its name in the manifest and in messages: a path without the machine's own folders."""
    location: str
    """Path or URL to open."""
    kind: Kind
    compression: Compression | None
    encoding: str
    """The encoding of a text or jsonl file; "auto": UTF-8, if it looks like that."""
    bytes: int
    changed: str
    """Time of change or ETag, where the file system has one: a changed input gives another plan."""

    @property
    def seekable(self) -> bool:
        """Whether it can be read from any offset; else only from its start, as UTF-8."""
        return self.compression is None and is_utf8(self.encoding)


@dataclass(frozen=True)
class Piece:
    """A range of an input: bytes of a file, row groups of a parquet file, or rows of a hub dataset."""

    input: int
    start: int
    stop: int


Part = list[Piece]


def find_inputs(config: SourceRecipe, output: str | None = None) -> list[Input]:
    """All inputs in the order of the recipe, each once; those of one folder or glob are sorted by name.

    A line on stderr names what is found and left out: see `find`, and files named twice, and those in the folder
    `output`.

    Raises BadInput: nothing found, an unknown format, empty files only.
    """
    if config.hub:
        name = f"{PurePosixPath(config.hub).name}/{config.hub_config or 'default'}/{config.hub_split}"
        table = tables.hub_table(config.hub, config.hub_config, config.hub_split)
        return [Input(name, config.hub, "hub", None, "utf-8", table.nbytes, "")]
    inputs: list[Input] = []
    taken: set[str] = set()
    left_out = LeftOut()
    for pattern in [config.paths] if isinstance(config.paths, str) else config.paths:
        found = find(_local_path(pattern), left_out)
        if not found:
            said = "; ".join(left_out.lines())
            raise BadInput(f"source.paths: {pattern}: no such file" + (f" ({said})" if said else ""))
        for file in found:
            real = file.location if is_url(file.location) else os.path.realpath(file.location)
            if output is not None and Path(real).is_relative_to(os.path.realpath(output)):
                left_out.add("in the output folder", file.location)
            elif real in taken:
                left_out.add("found twice", file.location)
            else:
                taken.add(real)
                inputs.append(_input(file, config))
    for line in left_out.lines():
        say(line)
    if not sum(i.bytes for i in inputs):
        raise BadInput(f"source.paths: {config.paths}: {len(inputs)} files, all empty")
    return inputs


def _local_path(pattern: str) -> str:
    """A file:// URL as the path that it names, so that one file is one file, whichever way it is named."""
    return url2pathname(urlsplit(pattern).path) if pattern.startswith("file://") else pattern


def check_unchanged(item: Input) -> None:
    """Raise BadInput where a file is no longer as it was when it was found."""
    if item.kind == "hub":
        return
    try:
        size, changed = state_of(item.location)
    except FileNotFoundError as error:
        raise BadInput(f"{item.name}: it was deleted while prep read it; run again when it is complete") from error
    if (size, changed) != (item.bytes, item.changed):
        raise BadInput(
            f"{item.name}: it was changed while prep read it ({item.bytes} bytes then, {size} now); run again when "
            "nothing writes to it any more"
        )


def content_digest(item: Input) -> str | None:
    """XXH3 of the first and the last MiB of a file, in hexadecimal; None for a hub dataset.

    It tells an edited file of the same size, mostly, and not a copy, whose time of change is another. The whole file
    would take too long: a dataset is compared with its sources at each call of `sharebert prep`.

    Raises BadInput where the file cannot be read.
    """
    return None if item.kind == "hub" else xxhash.xxh3_128_hexdigest(read_ends(item.location, _DIGEST_BYTES))


def plan_parts(inputs: Sequence[Input], config: SourceRecipe) -> list[Part]:
    """Divide the inputs into parts of about equal bytes; small inputs share a part."""
    part_bytes = min(max(sum(i.bytes for i in inputs) // _PARTS, _PART_BYTES[0]), _PART_BYTES[1])
    parts: list[Part] = []
    room = 0
    for number, item in enumerate(inputs):
        for start, stop, size in _ranges(item, config, part_bytes):
            if room < size // 2 or not parts:
                parts.append([])
                room = part_bytes
            parts[-1].append(Piece(number, start, stop))
            room -= size
    return parts


def _input(file: FoundFile, config: SourceRecipe) -> Input:
    kind = _kind(file.name, config.format)
    compression = compression_of(file.location, file.name)
    if kind == "parquet" and compression:
        raise BadInput(f"{file.name}: parquet compresses by itself; unpack the {compression} first")
    encoding = "utf-8" if kind == "parquet" else config.encoding
    return Input(file.name, file.location, kind, compression, encoding, file.bytes, file.changed)


def kind_of(name: str) -> Kind | None:
    """The format that a file's name tells, without the ending of its compression."""
    path = PurePosixPath(name.lower())
    return _KINDS.get(path.with_suffix("").suffix if path.suffix in COMPRESSION_SUFFIXES else path.suffix)


def _kind(name: str, forced: str) -> Kind:
    kind = kind_of(name) if forced == "auto" else forced
    if kind is None:
        raise BadInput(f"{name}: format unknown from its name; known are {', '.join(_KINDS)}; or set source.format")
    return kind  # type: ignore[return-value]


def _ranges(item: Input, config: SourceRecipe, part_bytes: int) -> list[tuple[int, int, int]]:
    """(start, stop, bytes) of the pieces of one input."""
    if not item.seekable:
        return [(0, item.bytes, item.bytes)]
    if item.kind == "parquet":
        return [(group, group + 1, size) for group, size in enumerate(tables.row_group_bytes(item.location))]
    units = item.bytes if item.kind != "hub" else len(tables.hub_table(config.hub, config.hub_config, config.hub_split))
    if item.kind == "text" and config.document == "file":
        edges = [*range(0, item.bytes, config.stride_bytes), item.bytes]
        return [(a, b, b - a) for a, b in pairwise(edges)]
    count = max(1, -(-item.bytes // part_bytes))
    edges = [units * i // count for i in range(count + 1)]
    return [(a, b, item.bytes // count) for a, b in pairwise(edges)]
