"""Compression is told by the first bytes of a file, not by its name."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from faulty_server import serve
from made_texts import made_texts, write_jsonl

from data_prep.read.documents import read_part
from data_prep.read.sources import SourceRecipe, find_inputs, plan_parts
from sharebert_common.errors import BadInput

TEXTS = made_texts(150, seed=2, words=20)
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}


def read(path: str | Path) -> list[str]:
    source = SourceRecipe(paths=str(path))
    inputs = find_inputs(source)
    parts = plan_parts(inputs, source)
    return [text for part in parts for batch in read_part(part, inputs, source, Counter()) for text in batch.texts]


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    return write_jsonl(tmp_path / "plain", TEXTS).read_bytes()


@pytest.mark.parametrize("kind", PACK)
@pytest.mark.parametrize("name", ["a.jsonl.{}", "a.JSONL.{}", "A.jsonl.{upper}", "a.jsonl", "a.jsonl.gz"])
def test_any_compression_under_any_name(tmp_path: Path, data: bytes, kind: str, name: str) -> None:
    path = tmp_path / name.format(kind, upper=kind.upper())
    path.write_bytes(PACK[kind](data[:1000]) + PACK[kind](data[1000:]))  # as `cat` makes of two files
    assert read(path) == TEXTS


def test_a_plain_file_with_the_name_of_a_compressed_one(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    assert read(tmp_path / "a.jsonl.gz") == TEXTS


def test_text_that_begins_like_bzip2(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("BZh9 is how such a file begins")
    assert read(tmp_path / "a.txt") == ["BZh9 is how such a file begins"]


NOT_READ = {
    "lz4": b"\x04\x22\x4d\x18\x64\x40\xa7\x06\x00\x00\x80hello\n\x00\x00\x00\x00\x8e\x5c\x8a\x1e",
    "lzma": lzma.compress(b"hello\n" * 9, format=lzma.FORMAT_ALONE),
    "lzip": b"LZIP\x01\x14hello",
    "snappy": b"\xff\x06\x00\x00sNaPpY\x01\x0a\x00\x00hello\n",
    "compress": b"\x1f\x9d\x90h\xca\xb0a\xf3\x06",
    "RAR": b"Rar!\x1a\x07\x00 hello",
    "7-Zip": b"7z\xbc\xaf\x27\x1c\x00\x04 hello",
}


@pytest.mark.parametrize("kind", [*NOT_READ, "zip"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.txt.gz"])
def test_other_compressions_are_named(tmp_path: Path, kind: str, name: str) -> None:
    """Short texts lie in such files as they are, so that nothing else would tell."""
    path = tmp_path / name
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("inner.txt", "hello")
    else:
        path.write_bytes(NOT_READ[kind])
    with pytest.raises(BadInput, match=rf"{name}: it is compressed with {kind}, which prep does not read; unpack it"):
        read(path)


def test_other_compressions_at_a_url(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(NOT_READ["lz4"])
    with serve(tmp_path) as server, pytest.raises(BadInput, match=r"a\.txt: it is compressed with lz4"):
        read(f"{server.url}/a.txt")


@pytest.mark.parametrize("text", ["LZIP is a compressor", "PK and Rar! and 7z", "]\n[", "sNaPpY", "\x1f up"])
def test_text_that_begins_like_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize("kind", PACK)
def test_truncated_and_damaged(tmp_path: Path, data: bytes, kind: str) -> None:
    packed, path = PACK[kind](data), tmp_path / f"a.jsonl.{kind}"
    for cut in (len(packed) - 1, len(packed) // 2, 30):
        path.write_bytes(packed[:cut])
        with pytest.raises(BadInput, match=rf"a\.jsonl\.{kind}: truncated"):
            read(path)
    path.write_bytes(packed[:300] + bytes(200) + packed[500:])
    with pytest.raises(BadInput, match=rf"a\.jsonl\.{kind}: damaged|a\.jsonl\.{kind}, line"):
        read(path)


@pytest.mark.parametrize("kind", PACK)
def test_at_a_url_the_name_must_be_right(tmp_path: Path, data: bytes, kind: str) -> None:
    (tmp_path / f"a.jsonl.{kind}").write_bytes(PACK[kind](data))
    (tmp_path / "b.jsonl").write_bytes(PACK[kind](data))
    (tmp_path / "plain").unlink()
    with serve(tmp_path) as server:
        assert read(f"{server.url}/a.jsonl.{kind}") == TEXTS
        with pytest.raises(BadInput, match=r"b\.jsonl: its data is \w+, and its name says not compressed"):
            read(f"{server.url}/b.jsonl")
