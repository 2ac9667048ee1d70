"""Inputs and datasets at URLs: real servers on loopback, with faults, and caches that keep to their size."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_server import FaultyServer, serve
from made_texts import made_texts, recipe, write_jsonl

from data_prep.pipeline import prepare
from data_prep.shards.cache import CacheRecipe
from data_prep.shards.reader import open_dataset
from pretrain.data.datasets import DataRecipe, open_datasets
from pretrain.data.loader import Loader
from sharebert_common import remote_files
from sharebert_common.errors import BadInput
from sharebert_common.recipe import parse
from sharebert_common.remote_files import open_binary

TEXTS = made_texts(300, seed=8)
FAULTS = ["error", "cut"]


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("data_prep.shards.cache.FIRST_WAIT_S", 0.001)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs, and with a dataset of many shards made from them."""
    folder = tmp_path_factory.mktemp("remote")
    write_jsonl(folder / "corpus.jsonl", TEXTS)
    pq.write_table(pa.table({"text": TEXTS}), folder / "corpus.parquet", row_group_size=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.tokens.shuffle._FEW_SHARDS", 80)
        patch.setattr("data_prep.tokens.shuffle._SMALL_SHARD_BYTES", 2000)
        prepare(recipe(folder / "dataset", folder / "corpus.jsonl", validation=0.05))
    return folder


@pytest.fixture
def server(local: Path) -> Iterator[FaultyServer]:
    with serve(local) as state:
        yield state


@pytest.fixture(scope="module")
def s3(local: Path) -> Iterator[str]:
    """The URL of a bucket of an S3 server that holds all files of the local folder."""
    from moto.server import ThreadedMotoServer

    settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for key, value in settings.items():
            patch.setenv(key, value)
        fs = fsspec.filesystem("s3")
        fs.mkdir("corpora")
        fs.put(str(local), "corpora/all", recursive=True)
        yield "s3://corpora/all"
        server.stop()


def everything(path: str | Path, cache: CacheRecipe | None = None) -> dict[str, list[list[list[int]]]]:
    dataset = open_dataset(path, cache)
    rows = {name: dataset.split(name).read(np.arange(dataset.split(name).rows)) for name in ("train", "validation")}
    return {name: [array.tolist() for array in arrays] for name, arrays in rows.items()}


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.parquet"])
def test_inputs_over_http_with_faults_make_the_same_dataset(
    local: Path, server: FaultyServer, tmp_path: Path, name: str
) -> None:
    here = prepare(recipe(tmp_path / "here", local / name))
    server.fault = lambda path, asked: FAULTS[asked % 2] if asked % 3 else None
    there = prepare(recipe(tmp_path / "there", f"{server.url}/{name}"))
    assert (there / "manifest.json").read_text() == (here / "manifest.json").read_text()


def test_inputs_and_datasets_on_s3(local: Path, s3: str, tmp_path: Path) -> None:
    here = prepare(recipe(tmp_path / "here", local / "corpus.jsonl"))
    for name, pattern in (("one", f"{s3}/corpus.jsonl"), ("glob", f"{s3}/corpus.json*")):
        there = prepare(recipe(tmp_path / name, pattern))
        assert (there / "manifest.json").read_text() == (here / "manifest.json").read_text()
    cache = CacheRecipe(folder=str(tmp_path / "cache"))
    assert everything(f"{s3}/dataset", cache) == everything(local / "dataset")
    open_dataset(f"{s3}/dataset", cache).verify()
    with pytest.raises(BadInput, match=r"s3://corpora/all/none\.txt: no such file"):
        prepare(recipe(tmp_path / "none", f"{s3}/none.txt"))


def test_a_server_that_stays_down_is_one_clear_line(server: FaultyServer, tmp_path: Path) -> None:
    server.fault = lambda path, asked: "error"
    with pytest.raises(BadInput, match=rf"{server.url}/corpus\.jsonl: 6 attempts failed"):
        prepare(recipe(tmp_path / "d", f"{server.url}/corpus.jsonl"))
    with pytest.raises(BadInput, match=r"no such file|cannot be read"):
        prepare(recipe(tmp_path / "e", f"{server.url}/none.jsonl"))


def test_a_dataset_over_http_with_faults(local: Path, server: FaultyServer, tmp_path: Path) -> None:
    server.fault = lambda path, asked: [*FAULTS, "flip", None][asked % 4] if "shard" in path else None
    cache = CacheRecipe(folder=str(tmp_path / "cache"))
    assert everything(f"{server.url}/dataset", cache) == everything(local / "dataset")
    served = sum(server.served.values())
    assert everything(f"{server.url}/dataset", cache) == everything(local / "dataset")
    assert sum(server.served.values()) - served < 100_000  # the manifest alone
    dataset = open_dataset(f"{server.url}/dataset", cache)
    assert dataset.tokenizer_path.read_bytes() == (local / "dataset" / "tokenizer.json").read_bytes()


def test_a_shard_that_is_damaged_at_its_source(server: FaultyServer, tmp_path: Path) -> None:
    server.fault = lambda path, asked: "flip" if path.endswith("train/shard-000001.tar") else None
    dataset = open_dataset(f"{server.url}/dataset", CacheRecipe(folder=str(tmp_path / "cache")))
    with pytest.raises(BadInput, match=r"train/shard-000001\.tar: damaged \(its checksum .*, 6 times"):
        dataset.verify()
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_url_needs_a_cache_large_enough(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="read through a cache on local disk"):
        open_dataset(f"{server.url}/dataset")
    with pytest.raises(BadInput, match=r"cache\.max_bytes: 100 is less than one shard"):
        open_dataset(f"{server.url}/dataset", CacheRecipe(folder=str(tmp_path), max_bytes=100))
    with pytest.raises(BadInput, match=r"nothing/manifest\.json: "):
        open_dataset(f"{server.url}/nothing", CacheRecipe(folder=str(tmp_path)))


def bytes_kept(folder: Path) -> int:
    """Bytes of the shards in a cache, with those that are still copied."""
    sizes = {}
    with (folder / ".lock").open("w") as lock:  # no file is added or deleted now, but a copy may be completed
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.glob("*/*/*shard-*.tar*"):
            if not path.name.endswith(".lock"):
                with suppress(FileNotFoundError):
                    sizes[path.name.strip(".").removesuffix(".part")] = path.stat().st_size
    return sum(sizes.values())


@pytest.mark.slow
def test_an_epoch_through_a_small_cache_reads_each_byte_once(local: Path, server: FaultyServer, tmp_path: Path) -> None:
    """Four ranks of a node train in step, each with a reader of its own, over a cache of a tenth of the dataset."""
    url, folder = f"{server.url}/dataset", tmp_path / "cache"
    shards = open_dataset(local / "dataset").manifest["splits"]["train"]["shards"]
    total = sum(shard["bytes"] for shard in shards)
    assert len(shards) > 50
    data = {"dataset": url, "global_batch": 4, "micro_batch": 1, "window_shards": 2, "prefetch": 1}
    settings = parse(DataRecipe, data | {"cache": {"folder": str(folder), "max_bytes": total // 10}}, "test")
    ranks = [Loader(open_datasets(settings), settings, seed=3, rank=rank, world_size=4) for rank in range(4)]
    rows = sum(shard["rows"] for shard in shards)
    largest_kept = 0
    for epoch in (1, 2):
        server.served.clear()
        consumed = (epoch - 1) * rows
        while consumed < epoch * rows - 4 * 4:  # without the rows that are read ahead
            consumed = max(next(rank).rows_consumed for rank in ranks)
            largest_kept = max(largest_kept, bytes_kept(folder))
        read = sum(count for path, count in server.served.items() if "train/" in path)
        assert 0.8 * total < read <= 1.1 * total
    for rank in ranks:
        rank.close()
    assert 0.5 * total / 10 < largest_kept <= total // 10


def test_a_cache_without_room_for_two_windows_is_refused(local: Path, tmp_path: Path) -> None:
    shards = open_dataset(local / "dataset").manifest["splits"]["train"]["shards"]
    needed = sum(sorted((shard["bytes"] for shard in shards), reverse=True)[:6])
    data = {"dataset": str(local / "dataset"), "global_batch": 8, "micro_batch": 8, "window_shards": 3}
    cache = {"folder": str(tmp_path / "cache"), "max_bytes": needed}
    open_datasets(parse(DataRecipe, data | {"cache": cache}, "test"))
    message = rf"data\.cache\.max_bytes: {needed - 1} is less than the {needed} bytes of two windows of 3 shards"
    with pytest.raises(BadInput, match=message):
        open_datasets(parse(DataRecipe, data | {"cache": cache | {"max_bytes": needed - 1}}, "test"))


def test_what_killed_processes_left_in_a_cache_is_removed(server: FaultyServer, tmp_path: Path) -> None:
    cache = CacheRecipe(folder=str(tmp_path / "cache"))
    folder = open_dataset(f"{server.url}/dataset", cache).path / "train"
    for name in (".shard-000001.tar.part", ".shard-000002.tar.part"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(1000))
    with (folder / ".shard-000002.tar.lock").open("w") as lock:  # another process fetches this one
        fcntl.flock(lock, fcntl.LOCK_EX)
        open_dataset(f"{server.url}/dataset", cache)
        assert [path.name for path in folder.glob(".*.part")] == [".shard-000002.tar.part"]


def _read_rows(url: str, folder: str, seed: int) -> int:
    split = open_dataset(url, CacheRecipe(folder=folder)).split("train")
    rows = np.random.default_rng(seed).permutation(split.rows)
    return sum(int(split.read(batch)[0].sum()) for batch in np.array_split(rows, 20))


def test_processes_of_a_node_share_one_copy(local: Path, server: FaultyServer, tmp_path: Path) -> None:
    url, folder = f"{server.url}/dataset", str(tmp_path / "cache")
    expected = int(open_dataset(local / "dataset").split("train").read(np.arange(_rows(local)))[0].sum())
    with multiprocessing.get_context("fork").Pool(3) as pool:
        found = pool.starmap(_read_rows, [(url, folder, seed) for seed in range(3)])
    assert found == [expected] * 3
    for path, count in server.served.items():
        if "train/" in path:
            assert count == (local / path.lstrip("/")).stat().st_size


def _rows(local: Path) -> int:
    return open_dataset(local / "dataset").split("train").rows


def test_staging_copies_everything_before_the_first_row(local: Path, server: FaultyServer, tmp_path: Path) -> None:
    for source in (f"{server.url}/dataset", str(local / "dataset")):  # a shared file system too is worth copying from
        cache = CacheRecipe(folder=str(tmp_path / f"cache{len(source)}"), stage=True)
        dataset = open_dataset(source, cache)
        server.fault = lambda path, asked: "error"
        rows = dataset.split("train").read(np.arange(_rows(local)))[0]
        np.testing.assert_array_equal(
            rows, open_dataset(local / "dataset").split("train").read(np.arange(len(rows)))[0]
        )
        assert str(dataset.path).startswith(cache.folder)


def test_ranges_are_retried_one_by_one(local: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_files, "RANGE_BYTES", 5000)
    server.fault = lambda path, asked: "cut" if asked % 2 else None
    data = (local / "corpus.jsonl").read_bytes()
    with open_binary(f"{server.url}/corpus.jsonl") as file:
        assert file.read() == data
        file.seek(-100, os.SEEK_END)
        assert file.read(1000) == data[-100:]
    assert sum(server.served.values()) < 1.6 * len(data) + 10_000  # not the whole file again for each fault
