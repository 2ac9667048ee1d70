"""Compression is told by the first bytes of a file, not by its name."""

from __future__ import annotations

import bz2
import gzip
import lzma
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
