"""A file in another encoding is refused or read by its encoding, and never becomes a dataset of rubbish."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.read.documents import read_part
from data_prep.read.sources import SourceRecipe, find_inputs, plan_parts
from sharebert_common.errors import BadInput

RUSSIAN = [f"Мама мыла раму, а папа читал газету номер {n}." for n in range(60)]
FRENCH = [f"L'été dernier, élèves et maîtres sont allés à la mer, numéro {n}." for n in range(60)]
ENGLISH = [f"The quick brown fox jumps over the lazy dog number {n}." for n in range(60)]
CHINESE = [f"中文文本没有空格。这是第{n}行,我们用它来测试编码。" for n in range(60)]


def read(path: Path, **config: Any) -> tuple[list[str], Counter[str]]:
    source = SourceRecipe(paths=str(path), **config)
    inputs, counts = find_inputs(source), Counter[str]()
    parts = plan_parts(inputs, source)
    return [t for part in parts for batch in read_part(part, inputs, source, counts) for t in batch.texts], counts


@pytest.mark.parametrize(
    ("lines", "encoding"),
    [
        (RUSSIAN, "utf-16"),
        (RUSSIAN, "utf-16-le"),
        (RUSSIAN, "utf-16-be"),
        (ENGLISH, "utf-16"),
        (ENGLISH, "utf-16-le"),
        (ENGLISH, "utf-16-be"),
        (ENGLISH, "utf-32"),
        (CHINESE, "utf-16-le"),
        (CHINESE, "utf-16-be"),
        (CHINESE, "gb18030"),
        (CHINESE, "utf-32-be"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (FRENCH, "latin-1"),
        (FRENCH, "cp1252"),
        (["日本語の文章です。エンコーディングを試します。"] * 40, "shift_jis"),
        (["日本語の文章です。エンコーディングを試します。"] * 40, "euc-jp"),
        (["日本語の文章です。エンコーディングを試します。"] * 40, "iso2022_jp"),
    ],
)
@pytest.mark.parametrize("document", ["line", "file", "jsonl"])
def test_other_encodings_are_recognised_and_read_where_they_are_named(
    tmp_path: Path, lines: list[str], encoding: str, document: str
) -> None:
    path = tmp_path / ("a.jsonl" if document == "jsonl" else "a.txt")
    written = [json.dumps({"text": t}, ensure_ascii=False) for t in lines] if document == "jsonl" else lines
    path.write_bytes("\n".join(written).encode(encoding))
    config = {} if document == "jsonl" else {"document": document}
    with pytest.raises(BadInput, match=rf"{path.name}: .*source\.encoding"):
        read(path, **config, bad_documents="skip")
    texts, counts = read(path, **config, encoding=encoding)
    assert texts == (["\n".join(lines)] if document == "file" else lines)
    assert counts["invalid_utf8"] == counts["bad_documents"] == 0


def test_utf8_by_its_name_takes_everything(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\n".join(FRENCH).encode("latin-1"))
    texts, counts = read(tmp_path / "a.txt", document="line", encoding="utf-8")
    assert len(texts) == counts["invalid_utf8"] == 60


def test_a_few_bad_bytes_are_repaired_as_before(tmp_path: Path) -> None:
    lines = [line.encode() for line in FRENCH * 20]
    for place in range(0, 1200, 30):
        lines[place] += b" \xff\xfe bad"
    (tmp_path / "a.txt").write_bytes(b"\n".join(lines) + b"\nNUL \0 alone")
    texts, counts = read(tmp_path / "a.txt", document="line")
    assert len(texts) == 1201
    assert counts["invalid_utf8"] == 40
    (tmp_path / "b.txt").write_text("\ufffd" * 500, "utf-8")  # it is UTF-8
    assert len(read(tmp_path / "b.txt")[0]) == 1


@pytest.mark.parametrize("encoding", ["utf8", "UTF-8", "utf-8-sig", "ascii"])
def test_names_of_utf8(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo", "utf-8")
    texts, _ = read(tmp_path / "a.txt", document="line", encoding=encoding)
    assert texts == ["one", "two"]


def test_long_files_are_read_in_pieces(tmp_path: Path) -> None:
    lines = [f"{line} {i}" for i in range(2000) for line in RUSSIAN[:40]]
    (tmp_path / "a.txt").write_bytes("\n".join(lines).encode("utf-16"))
    assert read(tmp_path / "a.txt", document="line", encoding="utf-16")[0] == lines


def test_invalid_bytes_of_a_named_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\n".join(RUSSIAN).encode("utf-16-le") + b"\x00\xd8")
    texts, counts = read(tmp_path / "a.txt", document="line", encoding="utf-16-le")
    assert texts[-1].endswith("\ufffd")
    assert counts["invalid_utf8"] == 1
    (tmp_path / "b.txt").write_bytes(b"one\ntw\x81o\nthree\nf\x81\x8dour")
    assert read(tmp_path / "b.txt", document="line", encoding="cp1252")[1]["invalid_utf8"] == 2
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one"}\n{"text": "tw\x81o"}\n')
    assert read(tmp_path / "b.jsonl", encoding="cp1252")[1]["invalid_utf8"] == 1
    with pytest.raises(BadInput, match=r"a\.txt: .*\(not utf-16-le\); .*encoding_errors: replace"):
        read(tmp_path / "a.txt", document="line", encoding="utf-16-le", encoding_errors="refuse")


@pytest.mark.parametrize("name", ["utf-17", "base64", "rot13", "undefined", "idna", "punycode"])
def test_unknown_encodings(name: str) -> None:
    with pytest.raises(ValueError, match=f"encoding: '{name}' is no encoding"):
        SourceRecipe(paths="x", encoding=name)
