"""`sharebert prep` as a whole: complete, the same for any number of workers, and safe to kill and to run again."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from made_texts import made_texts, recipe, tree, write_jsonl
from tokenizers import Tokenizer

from data_prep import parts
from data_prep.job import plan
from data_prep.pipeline import PrepRecipe, prepare
from data_prep.read import sources
from data_prep.shards.format import SPLITS
from data_prep.shards.reader import open_dataset
from data_prep.tokens import shuffle
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

TEXTS = made_texts(400, seed=11, words=60)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", TEXTS)


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give even a small corpus several parts and shards."""
    monkeypatch.setattr(sources, "_PART_BYTES", (20_000, 20_000))
    monkeypatch.setattr(shuffle, "_SMALL_SHARD_BYTES", 20_000)


def test_every_token_of_every_document_is_there_once(corpus: Path, tmp_path: Path, many_parts: None) -> None:
    dataset = open_dataset(prepare(recipe(tmp_path / "d", corpus, shards__rows_per_block=50)))
    dataset.verify()
    words = Tokenizer.from_file(str(dataset.tokenizer_path))
    expected = Counter(i for e in words.encode_batch(TEXTS, add_special_tokens=False) for i in e.ids)
    found: Counter[int] = Counter()
    special = dataset.special_ids
    documents: dict[str, Counter[tuple[int, ...]]] = {}
    for name in SPLITS:
        split, entry = dataset.split(name), dataset.manifest["splits"][name]
        tokens, document_ids = split.read(np.arange(split.rows))
        assert (tokens[:, 0] == special["cls"]).all()
        assert ((tokens == special["pad"]) == (document_ids == 0)).all()
        stream = tokens[:, 1:][document_ids[:, 1:] > 0].tolist()
        found.update(token for token in stream if token != special["sep"])
        text = f" {' '.join(map(str, stream))} ".split(f" {special['sep']} ")
        documents[name] = Counter(tuple(map(int, document.split())) for document in text if document)
        assert sum(documents[name].values()) == entry["documents"]
        assert (document_ids == 0).mean() < 0.05  # only the last row of each of these tiny shards is padded
    assert found == expected
    assert not documents["train"].keys() & documents["validation"].keys()
    assert sum(documents["validation"].values()) > 10
    entries = dataset.manifest["splits"]
    assert len(entries["train"]["shards"]) > 3
    assert entries["train"]["tokens"] + entries["validation"]["tokens"] == sum(expected.values())


def test_padding_is_under_half_a_percent(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", made_texts(1500, seed=1))
    dataset = open_dataset(prepare(recipe(tmp_path / "d", corpus, validation=0)))
    _, document_ids = dataset.split("train").read(np.arange(dataset.split("train").rows))
    assert (document_ids == 0).mean() < 0.005


def test_who_runs_the_parts_does_not_show(corpus: Path, tmp_path: Path) -> None:
    # In processes of their own, with the real sizes of parts: workers do not see a monkeypatch.
    vocabulary = prepare(recipe(tmp_path / "v", corpus)) / "tokenizer.json"
    big = write_jsonl(tmp_path / "corpus.jsonl", [f"{text} {i}" for i in range(80) for text in TEXTS])
    assert big.stat().st_size > 9 << 20
    values = {"tokenizer": vocabulary, "shards__bytes_per_shard": 1 << 20}
    alone = prepare(recipe(tmp_path / "alone", big, **values))
    assert len(open_dataset(alone).split("train").shard_rows) >= 2
    pooled = prepare(recipe(tmp_path / "pooled", big, workers=3, **values))
    assert tree(pooled) == tree(alone)


def test_an_array_of_tasks_makes_the_same_dataset(corpus: Path, tmp_path: Path, many_parts: None) -> None:
    alone = prepare(recipe(tmp_path / "alone", corpus))
    array = recipe(tmp_path / "array", corpus)
    for _ in range(2):  # one run of the array a stage
        for task in (2, 0, 1):
            prepare(array, task=(task, 3))
            assert not (tmp_path / "array" / "manifest.json").exists()
    with pytest.MonkeyPatch.context() as patch:  # all is done: the last call only merges
        patch.setattr(parts.LocalCores, "run", lambda *_: pytest.fail("nothing was left to do"))
        prepare(array)
    assert tree(tmp_path / "array") == tree(alone)
    with pytest.raises(BadInput, match="task: 3/3: tasks are numbered from 0 to 2"):
        prepare(recipe(tmp_path / "x", corpus), task=(3, 3))


def test_a_rerun_does_only_what_is_missing(
    corpus: Path, tmp_path: Path, many_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tree(prepare(recipe(tmp_path / "alone", corpus)))
    ours = recipe(tmp_path / "ours", corpus)
    prepare(ours, task=(1, 2))
    ran: list[int] = []
    original = parts._compute
    monkeypatch.setattr(
        parts, "_compute", lambda stage, job, work, n: (ran.append(n), original(stage, job, work, n))[1]
    )
    prepare(ours)
    encoded = len(plan(recipe(tmp_path / "count", corpus)).parts)
    assert encoded > 4
    assert [n for n in ran[: encoded // 2] if n % 2] == []
    assert tree(tmp_path / "ours") == alone
    ran.clear()
    before = (tmp_path / "ours" / "manifest.json").stat().st_mtime_ns
    assert prepare(ours) == tmp_path / "ours"
    assert ran == []
    assert (tmp_path / "ours" / "manifest.json").stat().st_mtime_ns == before


def test_manifest_and_shards_do_not_tell_where_they_were_made(corpus: Path, tmp_path: Path) -> None:
    trees = []
    for name in ("here", "there"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "corpus.jsonl").write_bytes(corpus.read_bytes())
        os.utime(folder / "corpus.jsonl", (0, len(trees)))
        trees.append(tree(prepare(recipe(folder / "dataset", folder / "corpus.jsonl"))))
        text = (folder / "dataset" / "manifest.json").read_text()
        assert str(tmp_path) not in text
        assert "workers" not in text
    assert trees[0] == trees[1]


def test_another_recipe_does_not_overwrite_a_dataset(corpus: Path, tmp_path: Path) -> None:
    folder = prepare(recipe(tmp_path / "d", corpus))
    before = tree(folder)
    with pytest.raises(BadInput, match=r"holds a dataset of another config \(seq_len is 64 there and 32 here\)"):
        prepare(recipe(folder, corpus, seq_len=32))
    more = write_jsonl(tmp_path / "more.jsonl", TEXTS[:10])
    with pytest.raises(BadInput, match="holds a dataset of another sources"):
        prepare(recipe(folder, [corpus, more]))
    other = Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.add_tokens(["<new>"])
    other.save(str(tmp_path / "other.json"))
    theirs = prepare(recipe(tmp_path / "theirs", corpus, tokenizer=folder / "tokenizer.json"))
    with pytest.raises(BadInput, match="holds a dataset of another tokenizer"):
        prepare(recipe(theirs, corpus, tokenizer=tmp_path / "other.json"))
    assert tree(folder) == before


def test_a_dataset_of_a_given_vocabulary_is_not_that_of_a_trained_one(corpus: Path, tmp_path: Path) -> None:
    trained = prepare(recipe(tmp_path / "trained", corpus))
    own = trained / "tokenizer.json"
    keys = {"tokenizer__train__vocab_size": 600}
    given = prepare(recipe(tmp_path / "given", corpus, tokenizer__path=own, **keys))
    with pytest.raises(BadInput, match=r"another tokenizer \(vocabulary is 'given' there and 'trained' here"):
        prepare(recipe(given, corpus))
    assert prepare(recipe(trained, corpus, tokenizer__path=own, **keys)) == trained, "it is the same vocabulary"


def test_files_that_were_edited_without_a_change_of_size_are_other_files(tmp_path: Path) -> None:
    """Sources and evaluation files; a copy of them with another time of change is the same."""
    corpus, judge = write_jsonl(tmp_path / "c.jsonl", TEXTS), tmp_path / "judge.txt"
    judge.write_text("jumps over the lazy dog")
    ours = recipe(tmp_path / "d", corpus, clean__evaluation__paths=[judge], clean__evaluation__ngram=3)
    folder = prepare(ours)
    judge.write_text("jumps over the lazy cat")
    with pytest.raises(BadInput, match=r"another evaluation set \(evaluation_sha256 is '"):
        prepare(ours)
    judge.write_text("jumps over the lazy dog")
    for file in (corpus, judge):
        os.utime(file, (0, 0))
    assert prepare(ours) == folder
    text = corpus.read_bytes()
    corpus.write_bytes(text.replace(b'"text": "0 ', b'"text": "9 '))
    assert len(text) == corpus.stat().st_size
    with pytest.raises(BadInput, match=r"another sources \(c.jsonl.digest is '"):
        prepare(ours)


def test_a_half_made_dataset_of_another_recipe_is_no_hindrance(corpus: Path, tmp_path: Path, many_parts: None) -> None:
    alone = tree(prepare(recipe(tmp_path / "alone", corpus)))
    prepare(recipe(tmp_path / "d", corpus, seed=5), task=(0, 2))
    stale = tmp_path / "d" / "train" / "shard-000099.tar"
    stale.parent.mkdir()
    stale.write_text("left by a merge that was killed")
    assert tree(prepare(recipe(tmp_path / "d", corpus))) == alone


@pytest.mark.parametrize("name", ["train/my-labels.csv", "validation/photos/", "train/shard-1.tar", "train"])
def test_what_no_prep_made_is_not_deleted(corpus: Path, tmp_path: Path, name: str) -> None:
    """It is refused before any work is done."""
    mine = tmp_path / "d" / name
    mine.parent.mkdir(parents=True)
    if name.endswith("/"):
        mine.mkdir()
    else:
        mine.write_text("precious")
    with pytest.raises(BadInput, match=f"output: {mine} is ") as raised:
        prepare(recipe(tmp_path / "d", corpus))
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "d" / ".work").glob("*/*"))
    assert mine.exists()


def test_hidden_files_beside_the_shards_stay(corpus: Path, tmp_path: Path) -> None:
    mine = tmp_path / "d" / "train" / ".directory"
    mine.parent.mkdir(parents=True)
    mine.write_text("of a desktop")
    open_dataset(prepare(recipe(tmp_path / "d", corpus)))
    assert mine.exists()


def test_vocabularies_and_long_rows(corpus: Path, tmp_path: Path) -> None:
    bpe = recipe(tmp_path / "bpe", corpus, tokenizer__train__type="bpe", seq_len=512)
    dataset = open_dataset(prepare(bpe))
    assert dataset.seq_len == 512
    tokens, document_ids = dataset.split("train").read(np.array([0]))
    text = Tokenizer.from_file(str(dataset.tokenizer_path)).decode(tokens[0][document_ids[0] == 2].tolist())
    assert text in TEXTS
    urls = str(tmp_path / "bpe" / "train" / "shard-000000.tar")
    assert next(iter(webdataset.WebDataset(urls, shardshuffle=False).decode()))["tokens.npy"].shape[1] == 512


def test_nothing_to_do_anything_with(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n ")
    with pytest.raises(BadInput):
        prepare(recipe(tmp_path / "d", tmp_path / "blank.txt"))
    assert not (tmp_path / "d" / "manifest.json").exists()
    (tmp_path / "one.txt").write_text(" ".join(TEXTS))
    with pytest.raises(BadInput, match=r"validation: 0\.1 takes all of the 1 documents"):
        prepare(recipe(tmp_path / "e", tmp_path / "one.txt"))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"output: .*file/d: Not a directory"):
        prepare(recipe(tmp_path / "file" / "d", tmp_path / "one.txt"))
    with pytest.raises(BadInput, match=r"output: s3://b/d: a dataset is made on a local or shared disk"):
        prepare(recipe(Path("x"), tmp_path / "one.txt", output="s3://b/d"))
    with pytest.raises(BadInput, match="source: give paths, or hub"):
        load(PrepRecipe, None, ["output=x", "source.text_key=y"])
    with pytest.raises(
        BadInput, match=r"source: paths and hub are both given; .* source.paths=\[\] or source.hub=null"
    ):
        load(PrepRecipe, "corpus", ["source.hub=y"])
    assert load(PrepRecipe, "corpus", ["source.hub=y", "source.paths=[]"]).source.hub == "y"


def test_many_unknown_tokens_are_said(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocabulary = prepare(recipe(tmp_path / "v", corpus)) / "tokenizer.json"
    assert "warning" not in capsys.readouterr().err
    other = write_jsonl(tmp_path / "other.jsonl", [f"Здравствуй мир номер {n}" for n in range(50)])
    prepare(recipe(tmp_path / "d", other, tokenizer=vocabulary))
    assert re.search(r"prep: warning: \d\d% of the tokens are unknown: .*source\.encoding", capsys.readouterr().err)


def in_a_fork(action: Callable[[], object]) -> int:
    """Run in a child process, which the caller may kill. Returns its id."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def test_killed_at_any_moment_and_run_again_it_gives_the_same_bytes(
    corpus: Path, tmp_path: Path, many_parts: None
) -> None:
    vocabulary = prepare(recipe(tmp_path / "v", corpus)) / "tokenizer.json"  # spares each try the training
    started = time.monotonic()
    alone = tree(prepare(recipe(tmp_path / "alone", corpus, tokenizer=vocabulary)))
    whole_s = time.monotonic() - started
    rng = random.Random(0)
    killed = 0
    for number in range(12):
        ours = recipe(tmp_path / f"killed-{number}", corpus, tokenizer=vocabulary)
        for _ in range(4):
            child = in_a_fork(lambda: prepare(ours))  # noqa: B023
            time.sleep(rng.uniform(0, whole_s / 2))
            os.kill(child, signal.SIGKILL)
            killed += os.waitpid(child, 0)[1] == signal.SIGKILL
        assert tree(prepare(ours)) == alone
    assert killed >= 20


def test_workers_do_not_outlive_a_killed_run(corpus: Path, tmp_path: Path) -> None:
    vocabulary = prepare(recipe(tmp_path / "v", corpus)) / "tokenizer.json"
    big = write_jsonl(tmp_path / "corpus.jsonl", [f"{text} {i}" for i in range(80) for text in TEXTS])
    child = in_a_fork(lambda: prepare(recipe(tmp_path / "d", big, tokenizer=vocabulary, workers=2)))
    children = Path(f"/proc/{child}/task/{child}/children")
    deadline = time.monotonic() + 60
    while not (workers := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if is_alive(pid)]


def is_alive(pid: str) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1 MB, if this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_clear_line_and_the_rerun_goes_on(
    small_disk: Path, corpus: Path, tmp_path: Path, many_parts: None
) -> None:
    vocabulary = prepare(recipe(tmp_path / "v", corpus)) / "tokenizer.json"
    alone = tree(prepare(recipe(tmp_path / "alone", corpus, tokenizer=vocabulary)))
    ballast, refused = small_disk / "ballast", 0
    for free_bytes in range(0, 1 << 20, 40_000):
        ballast.write_bytes(b"")
        state = os.statvfs(small_disk)
        ballast.write_bytes(bytes(max(0, state.f_bavail * state.f_bsize - free_bytes)))
        try:
            prepare(recipe(small_disk / "d", corpus, tokenizer=vocabulary))
            break
        except BadInput as error:
            refused += "the disk is full; free some space and run again, what is done is kept" in str(error)
            found = tree(small_disk / "d").keys()
        assert "manifest.json" not in found
    assert refused >= 4
    assert tree(small_disk / "d") == alone
