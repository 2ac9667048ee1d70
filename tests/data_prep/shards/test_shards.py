"""Format 1: written, read by plain webdataset, read at random, and refused where it is damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep.shards.dataset_files import LocalFiles
from data_prep.shards.format import fingerprint, shard_name, write_manifest
from data_prep.shards.reader import open_dataset
from data_prep.shards.shard_file import write_shard
from sharebert_common.errors import BadInput
from sharebert_common.files import file_sha256

SEQ_LEN = 48
SHARD_ROWS = {"train": [100, 64, 7], "validation": [5]}


def arrays(rows: int, seed: int, dtype: str = "uint16", segments_dtype: str = "uint8") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, np.iinfo(dtype).max, (rows, SEQ_LEN), dtype)
    return tokens, rng.integers(0, 9, (rows, SEQ_LEN), segments_dtype)


def make(folder: Path, dtype: str = "uint16", segments_dtype: str = "uint8", rows_per_block: int = 32) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    splits = {}
    for split, shard_rows in SHARD_ROWS.items():
        entries = []
        for number, rows in enumerate(shard_rows):
            tokens, document_ids = arrays(rows, number, dtype, segments_dtype)
            starts = range(0, rows, rows_per_block)
            blocks = ((tokens[i : i + rows_per_block], document_ids[i : i + rows_per_block]) for i in starts)
            entries.append(write_shard(folder, shard_name(split, number), blocks))
        splits[split] = {"rows": sum(shard_rows), "tokens": 0, "documents": 0, "shards": entries}
    manifest = {
        "seq_len": SEQ_LEN,
        "dtype": dtype,
        "segments_dtype": segments_dtype,
        "vocab_size": 600,
        "tokenizer_sha256": file_sha256(folder / "tokenizer.json"),
        "special_ids": {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4},
        "config": {},
        "sources": [],
        "splits": splits,
        "versions": {},
    }
    write_manifest(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("shards") / "dataset")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def expected(split: str, dtype: str = "uint16", segments_dtype: str = "uint8") -> tuple[np.ndarray, np.ndarray]:
    parts = [arrays(rows, number, dtype, segments_dtype) for number, rows in enumerate(SHARD_ROWS[split])]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


@pytest.mark.parametrize(("dtype", "segments_dtype"), [("uint16", "uint8"), ("uint32", "uint16")])
def test_reads_any_rows_in_any_order(tmp_path: Path, dtype: str, segments_dtype: str) -> None:
    dataset = open_dataset(make(tmp_path / "d", dtype, segments_dtype))
    for split, shard_rows in SHARD_ROWS.items():
        tokens, document_ids = expected(split, dtype, segments_dtype)
        rows = np.random.default_rng(1).integers(0, sum(shard_rows), 300)
        got = dataset.split(split)
        assert got.shard_rows == shard_rows
        for asked in (rows, rows[:1], rows[:0], np.arange(got.rows)):
            read_tokens, read_segments = got.read(asked)
            assert read_tokens.dtype == dtype
            assert read_segments.dtype == segments_dtype
            np.testing.assert_array_equal(read_tokens, tokens[asked])
            np.testing.assert_array_equal(read_segments, document_ids[asked])


def test_rows_are_copies_and_rows_beyond_the_end_are_refused(whole: Path) -> None:
    split = open_dataset(whole).split("train")
    tokens, document_ids = split.read(np.array([3]))
    tokens[:], document_ids[:] = 0, 0
    assert split.read(np.array([3]))[0].any()
    for bad in (-1, split.rows):
        with pytest.raises(IndexError, match=str(split.rows)):
            split.read(np.array([0, bad]))


def test_plain_webdataset_reads_the_blocks(whole: Path) -> None:
    urls = [str(whole / shard_name("train", number)) for number in range(3)]
    blocks = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    tokens, document_ids = expected("train")
    np.testing.assert_array_equal(np.concatenate([b["tokens.npy"] for b in blocks]), tokens)
    np.testing.assert_array_equal(np.concatenate([b["segments.npy"] for b in blocks]), document_ids)
    assert [b["json"]["rows"] for b in blocks] == [32, 32, 32, 4, 32, 32, 7]


def test_tar_headers_tell_nothing_of_time_and_owner(whole: Path) -> None:
    with tarfile.open(whole / shard_name("train", 0)) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_same_rows_same_bytes(whole: Path, tmp_path: Path) -> None:
    again = make(tmp_path / "again")
    for file in ("manifest.json", shard_name("train", 1)):
        assert (again / file).read_bytes() == (whole / file).read_bytes()


def test_bytes_on_disk_are_those_of_the_arrays(tmp_path: Path) -> None:
    tokens, document_ids = np.zeros((8192, 128), np.uint16), np.zeros((8192, 128), np.uint8)
    blocks = ((tokens[i : i + 4096], document_ids[i : i + 4096]) for i in (0, 4096))
    entry = write_shard(tmp_path, "train/shard-000000.tar", blocks)
    assert entry["bytes"] <= 1.005 * (tokens.nbytes + document_ids.nbytes)


def test_fingerprint_depends_on_what_rows_are_seen(whole: Path, tmp_path: Path) -> None:
    first = open_dataset(whole)
    assert len(first.fingerprint) == 64
    manifest = json.loads((whole / "manifest.json").read_text())
    for change in ({"seq_len": 32}, {"tokenizer_sha256": "0"}, {"vocab_size": 601}):
        assert fingerprint({**manifest, **change}) != first.fingerprint
    assert fingerprint({**manifest, "sources": ["x"], "config": {"a": 1}}) == first.fingerprint


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def blocks():
        yield np.zeros((4, SEQ_LEN), np.uint16), np.zeros((4, SEQ_LEN), np.uint8)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_shard(tmp_path, "train/shard-000000.tar", blocks())
    assert list((tmp_path / "train").iterdir()) == []


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"manifest\.json: no dataset here \(`sharebert prep` has not finished"):
        open_dataset(tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        open_dataset(tmp_path / "none")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": 1', '"format": 2', r"manifest\.json: format 2; this version reads format 1"),
        ("{", "", r"manifest\.json: not readable as JSON"),
        ('"seq_len": 48', '"seq_len": 40', r"manifest\.json: damaged \(its fingerprint"),
        ('"special_ids"', '"special"', r"manifest\.json: damaged \(KeyError: 'special_ids'"),
    ],
)
def test_damaged_manifest(copy: Path, old: str, new: str, message: str) -> None:
    file = copy / "manifest.json"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(BadInput, match=message):
        open_dataset(copy)


def test_missing_or_cut_files(copy: Path) -> None:
    shard = copy / shard_name("train", 1)
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(BadInput, match=f"{shard}: {len(data) - 512} bytes where the manifest says {len(data)}"):
        open_dataset(copy)
    shard.unlink()
    with pytest.raises(BadInput, match=f"{shard}: missing"):
        open_dataset(copy)
    shard.write_bytes(data)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"tokenizer\.json: missing"):
        open_dataset(copy)


def test_verify_finds_one_flipped_bit(copy: Path) -> None:
    open_dataset(copy).verify()
    for name in (shard_name("validation", 0), "tokenizer.json"):
        file = copy / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(BadInput, match=f"{file}: damaged"):
            open_dataset(copy).verify()
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize("offset", [0, 512 + 20, 4096 + 10])
def test_damaged_header_names_the_file(copy: Path, offset: int) -> None:
    shard = copy / shard_name("train", 0)
    data = bytearray(shard.read_bytes())
    data[offset] ^= 0xFF
    shard.write_bytes(data)
    split = open_dataset(copy).split("train")
    with pytest.raises(BadInput, match=f"{shard}: damaged \\(header of block"):
        split.read(np.array([1]))
    split.read(np.array([120]))  # another shard


def test_threads_share_a_split(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalFiles, "open_shards", 1)  # every read opens and closes shards
    split, (tokens, _) = open_dataset(whole).split("train"), expected("train")
    wrong = []

    def read(seed: int) -> None:
        for rows in np.random.default_rng(seed).integers(0, split.rows, (50, 16)):
            if not np.array_equal(split.read(rows)[0], tokens[rows]):
                wrong.append(rows)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_unknown_split(whole: Path) -> None:
    with pytest.raises(BadInput, match="no split 'test'"):
        open_dataset(whole).split("test")


def test_importing_the_reader_takes_no_heavy_package_with_it() -> None:
    heavy = {"torch", "datasets", "tokenizers", "pyarrow", "fsspec"}
    code = "import sys, data_prep.shards.reader; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert not heavy & set(loaded)


@pytest.mark.parametrize(
    "name", ["../outside.tar", "train/../../outside.tar", "/etc/passwd", "train/..", "other/x.tar"]
)
def test_a_shard_cannot_lie_outside_of_its_dataset(whole: Path, tmp_path: Path, name: str) -> None:
    """A cache would write its copy there."""
    folder = Path(shutil.copytree(whole, tmp_path / "dataset"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["name"] = name
    del manifest["fingerprint"]
    write_manifest(folder, manifest)
    with pytest.raises(BadInput, match="which is no file of train/ or validation/"):
        open_dataset(folder)


def test_a_shard_that_is_cut_while_it_is_read_is_named(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "dataset"))
    split = open_dataset(folder).split("train")
    split.read(np.arange(3))
    file = folder / shard_name("train", 0)
    with file.open("r+b") as out:
        out.truncate(file.stat().st_size - 1)
    with pytest.raises(BadInput, match=r"shard-000000\.tar: cut to \d+ of \d+ bytes"):
        split.read(np.arange(3))
