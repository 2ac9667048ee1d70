"""Reading: each document once, however the input is divided; each kind of bad input as the config says."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from made_texts import made_texts, write_jsonl

from data_prep.read import documents, sources
from data_prep.read.documents import read_part
from data_prep.read.sources import SourceRecipe, find_inputs, plan_parts
from sharebert_common.errors import BadInput

TEXTS = made_texts(150, seed=2, words=20)


def read(**config: Any) -> tuple[list[str], Counter[str]]:
    source = SourceRecipe(**{k: str(v) if isinstance(v, Path) else v for k, v in config.items()})
    inputs, counts, texts = find_inputs(source), Counter[str](), []
    for part in plan_parts(inputs, source):
        numbers: list[int] = []
        for batch in read_part(part, inputs, source, counts):
            texts += batch.texts
            numbers += batch.numbers.tolist()
        assert numbers == list(range(len(numbers)))
    assert counts["documents_in"] == len(texts)
    assert counts["bytes_in"] == sum(len(text.encode()) for text in texts)
    return texts, counts


def pack(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":  # two members, as `cat a.gz b.gz` makes
        return gzip.compress(data[:1000]) + gzip.compress(data[1000:])
    if suffix == ".zst":
        return zstandard.compress(data[:1000]) + zstandard.compress(data[1000:])
    return data


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> random.Random:
    """Read and divide in tiny steps, so that boundaries are everywhere. Returns the generator of part sizes."""
    monkeypatch.setattr(documents, "READ_BYTES", 64)
    return random.Random(0)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_in_any_parts(
    tmp_path: Path, suffix: str, small_steps: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(write_jsonl(tmp_path / "plain", TEXTS).read_bytes(), suffix))
    for _ in range(12):
        monkeypatch.setattr(sources, "_PART_BYTES", (small_steps.randint(40, 4000),) * 2)
        assert read(paths=path)[0] == TEXTS


@pytest.mark.parametrize("document", ["line", "paragraph"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_records_in_any_parts(
    tmp_path: Path, document: str, newline: str, small_steps: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    separator = {"line": newline, "paragraph": newline + "  " + newline + newline}[document]
    records = [t.replace("\t", " ") if document == "line" else t.replace(" ", newline, 1) for t in TEXTS]
    (tmp_path / "a.txt").write_bytes(separator.join(records).encode())
    for _ in range(12):
        monkeypatch.setattr(sources, "_PART_BYTES", (small_steps.randint(40, 4000),) * 2)
        assert [t.strip() for t in read(paths=tmp_path / "a.txt", document=document)[0]] == [r.strip() for r in records]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("document", ["file", "line", "paragraph"])
def test_long_text_is_cut_at_whitespace_and_nothing_is_lost(
    tmp_path: Path, document: str, suffix: str, small_steps: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        " ".join(TEXTS).replace("\t", " ") + " end " + "漢" * 900 + " \n\n " + " ".join(TEXTS[:40]).replace("\t", " ")
    )
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(text.encode(), suffix))
    for _ in range(8):
        monkeypatch.setattr(sources, "_PART_BYTES", (small_steps.randint(200, 9000),) * 2)
        texts, counts = read(paths=tmp_path / f"a.txt{suffix}", document=document, max_document_bytes=1024)
        assert max(len(t.encode()) for t in texts) <= 1024
        assert counts["splits"] >= len(text.encode()) // 1024
        assert "".join("".join(texts).split()) == "".join(text.split())  # no half character, no half word lost
        words = set(text.split())
        assert all(set(t.split()) <= words for t in texts if "漢" not in t)


def test_a_file_is_one_document(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_bytes(b"\xef\xbb\xbf" * (number == 1) + f"file {number}\n\nmore\n".encode())
    (tmp_path / ".hidden.txt").write_text("no")
    assert [t.split("\n")[0] for t in read(paths=tmp_path)[0]] == ["file 0", "file 1", "file 2"]
    assert len(read(paths=str(tmp_path / "[01].txt"))[0]) == 2


@pytest.mark.parametrize("kind", ["parquet", "hub", "saved"])
def test_tables_in_any_parts(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PART_BYTES", (2000, 2000))
    table = pa.table({"n": range(len(TEXTS)), "text": TEXTS})
    folder = tmp_path / "data"
    if kind == "saved":
        datasets.Dataset(table).save_to_disk(str(folder))
    else:
        folder.mkdir()
        pq.write_table(table, folder / "train.parquet", row_group_size=13)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = {"paths": folder} if kind == "parquet" else {"hub": folder}
    source = SourceRecipe(**{k: str(v) for k, v in config.items()})
    assert len(plan_parts(find_inputs(source), source)) > 3
    assert read(**config)[0] == TEXTS


def test_a_hub_folder_of_files_with_other_columns_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 3)
    (tmp_path / "b.jsonl").write_text('{"text": "two", "url": "u"}\n' * 3)
    said = r"(column names don't match|must have the same columns)"  # by the version of `datasets`
    with pytest.raises(BadInput, match=rf"source\.hub: .*{said}.*; .*give it to source\.paths") as error:
        read(hub=tmp_path)
    assert "\n" not in str(error.value)
    assert sorted(read(paths=tmp_path)[0]) == ["one"] * 3 + ["two"] * 3


def test_a_hub_folder_that_looks_like_a_pattern_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "[a]"
    folder.mkdir()
    pq.write_table(pa.table({"text": TEXTS}), folder / "train.parquet")
    (tmp_path / "b").symlink_to(folder)
    for hub in (folder, tmp_path / "b"):
        with pytest.raises(BadInput, match=r"source\.hub: .*\[a\]: `datasets` takes .* for a pattern"):
            read(hub=hub)
    assert read(paths=folder)[0] == TEXTS


@pytest.mark.parametrize("key", ["text", "meta.text", "text.raw"])
def test_columns_with_a_dot_in_their_name(tmp_path: Path, key: str) -> None:
    columns = {"text": ["a"], "meta.text": ["b"], "meta": [{"text": "c"}], "text.raw": ["d"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert read(paths=tmp_path / "a.parquet", text_key=key)[0] == columns[key]


def test_strings_written_as_views(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS, pa.string_view())}), tmp_path / "a.parquet")
    assert read(paths=tmp_path / "a.parquet")[0] == TEXTS


def test_many_small_files_share_parts(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:04d}.txt").write_text(text, "utf-8")
    source = SourceRecipe(paths=str(tmp_path))
    inputs = find_inputs(source)
    assert len(inputs) == len(TEXTS)
    assert len(plan_parts(inputs, source)) == 1
    assert read(paths=tmp_path)[0] == TEXTS


def test_links_are_the_files_that_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere" / "long name.txt"
    real.write_text("one text", "utf-8")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.txt").symlink_to(real)
    (tmp_path / "links" / "broken.txt").symlink_to(tmp_path / "nothing")
    for paths in (tmp_path / "links", tmp_path / "links" / "*.txt", tmp_path / "links" / "b.txt"):
        (found,) = find_inputs(SourceRecipe(paths=str(paths)))
        assert (Path(found.name).name, found.bytes) == ("b.txt", len("one text"))
        assert read(paths=paths)[0] == ["one text"]


BAD_LINES = {
    "not JSON": b'{"text": "cut',
    "no text under 'text' (its keys: body)": b'{"body": "x"}',
    "'text' is a number, not text": b'{"text": 3}',
    "'text' is null, not text": b'{"text": null}',
    "'text' is a list, not text": b'{"text": ["a"]}',
    "'text' is true or false, not text": b'{"text": true}',
    "no text under 'text' (it is a list, not an object)": b"[1]",
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_json_lines(tmp_path: Path, what: str) -> None:
    good = [json.dumps({"text": text}).encode() for text in TEXTS[:5]]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*good[:3], b"", BAD_LINES[what], *good[3:]]))
    with pytest.raises(BadInput) as error:
        read(paths=path)
    assert str(error.value).startswith("a.jsonl, line 5: ")
    assert what in str(error.value)
    assert "source.bad_documents: skip" in str(error.value)
    texts, counts = read(paths=path, bad_documents="skip")
    assert texts == TEXTS[:5]
    assert counts["bad_documents"] == 1


def test_invalid_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\xfe two\nthree\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xe9"}\n{"text": "lone \\ud800 one"}\n')
    texts, counts = read(paths=tmp_path / "a.txt", document="line")
    assert texts == ["one", "two \ufffd\ufffd two", "three"]
    assert counts["invalid_utf8"] == 1
    texts, counts = read(paths=tmp_path / "b.jsonl")
    assert texts == ["ok", "\ufffd", "lone \ufffd one"]
    assert counts["invalid_utf8"] == 2
    with pytest.raises(BadInput, match=r"a\.txt, line 2: byte 0xff is not UTF-8; .*encoding_errors: replace"):
        read(paths=tmp_path / "a.txt", document="line", encoding_errors="refuse")
    with pytest.raises(BadInput, match=r"b\.jsonl, line 2: byte 0xe9 is not UTF-8"):
        read(paths=tmp_path / "b.jsonl", encoding_errors="refuse")


def test_long_documents_in_jsonl_and_parquet(tmp_path: Path, small_steps: random.Random) -> None:
    texts = [*TEXTS[:3], "x" * 5000, *TEXTS[3:6], "y" * 1500, TEXTS[6]]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet")
    for file in (path, tmp_path / "b.parquet"):
        with pytest.raises(BadInput, match=rf"{file.name}.*: a document of \d+ bytes or more, over .* \(1024\)"):
            read(paths=file, max_document_bytes=1024)
        got, counts = read(paths=file, max_document_bytes=1024, long_documents="skip")
        assert got == TEXTS[:7]
        assert counts["long_documents"] == 2


def test_null_text_in_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"a\.parquet, row 2: 'text' is null, not text"):
        read(paths=tmp_path / "a.parquet")
    assert read(paths=tmp_path / "a.parquet", bad_documents="skip")[0] == ["a", "b"]


def test_the_row_of_a_null_is_that_of_the_file(tmp_path: Path) -> None:
    texts: list[str | None] = [str(n) for n in range(4000)]
    texts[3211] = None
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=1500)
    with pytest.raises(BadInput, match=r"a\.parquet, row 3212: 'text' is null"):
        read(paths=tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_and_damaged_compressed_files(tmp_path: Path, suffix: str) -> None:
    data = pack(write_jsonl(tmp_path / "plain", TEXTS).read_bytes(), suffix)
    path = tmp_path / f"a.jsonl{suffix}"
    for cut in (len(data) - 1, len(data) // 2, 30):
        path.write_bytes(data[:cut])
        with pytest.raises(BadInput, match=rf"a\.jsonl\{suffix}: truncated"):
            read(paths=path)
    path.write_bytes(data[:300] + bytes(200) + data[500:])
    with pytest.raises(BadInput, match=rf"a\.jsonl\{suffix}: damaged|a\.jsonl\{suffix}, line"):
        read(paths=path)


def test_inputs_that_are_not_there_or_not_known(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "a.parquet").write_text("x")
    (tmp_path / "empty.txt").write_text("")
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "b.parquet")
    for config, message in (
        ({"paths": tmp_path / "none.txt"}, r"none\.txt: no such file"),
        ({"paths": tmp_path / "*.xyz"}, r"\*\.xyz: no such file"),
        ({"paths": tmp_path / "a.csv"}, r"a\.csv: format unknown from its name; .* source\.format"),
        ({"paths": tmp_path / "a.parquet"}, r"a\.parquet: not readable as parquet"),
        ({"paths": tmp_path / "empty.txt"}, r"1 files, all empty"),
        ({"paths": tmp_path / "b.parquet", "text_key": "bodi"}, r"b\.parquet: no column 'bodi'; did you mean 'body'"),
        ({"paths": tmp_path / "b.parquet", "text_key": "n"}, r"b\.parquet: column 'n' holds int64, not text"),
        ({"hub": tmp_path / "nothing"}, r"source\.hub: .*nothing"),
    ):
        with pytest.raises(BadInput, match=message):
            read(**config)


def test_format_can_be_set_where_the_name_does_not_tell(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("one\ntwo")
    assert read(paths=tmp_path / "corpus", format="text", document="line")[0] == ["one", "two"]
