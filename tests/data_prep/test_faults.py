"""Power cuts, inputs that change, two preps in one folder: nothing is lost, and nothing wrong is made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_texts import made_texts, recipe, tree, write_jsonl

from data_prep import merge as merge_module
from data_prep import parts
from data_prep.pipeline import PrepRecipe, prepare
from data_prep.read import sources
from data_prep.shards.reader import open_dataset
from data_prep.tokens import shuffle
from sharebert_common.errors import BadInput

TEXTS = made_texts(300, seed=12, words=60)
CLEAN = {"clean__exact_duplicates": True, "clean__near_duplicates": 0.8}


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give even a small corpus several parts and shards."""
    monkeypatch.setattr(sources, "_PART_BYTES", (20_000, 20_000))
    monkeypatch.setattr(shuffle, "_SMALL_SHARD_BYTES", 20_000)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


def stopped_before_the_merge(ours: PrepRecipe) -> None:
    """All parts of all stages are done."""
    for _ in range(4):
        prepare(ours, task=(0, 1))
    shuffle._mapped.cache_clear()  # the next prep is another process


def empty(file: Path) -> None:
    file.write_bytes(b"")


def half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [empty, half, Path.unlink])
@pytest.mark.parametrize(
    "pattern", ["*/part-*/stats.json", "scan/*/*", "dedup/*/*.npy", "encode/*/*", "pack/*/*/*", "*/part-*/**/*"]
)
def test_damaged_parts_are_made_again(
    corpus: Path, tmp_path: Path, pattern: str, damage: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tree(prepare(recipe(tmp_path / "alone", corpus, **CLEAN)))
    ours = recipe(tmp_path / "ours", corpus, **CLEAN)
    stopped_before_the_merge(ours)
    (work,) = (path for path in (tmp_path / "ours" / ".work").iterdir() if path.is_dir())
    files = [path for path in work.glob(pattern) if path.is_file()]
    assert len(files) > 1
    for file in files:
        damage(file)
    assert tree(prepare(ours)) == alone
    assert "is damaged, and is made again" in capsys.readouterr().err


def test_every_part_and_the_dataset_are_on_the_disk_before_they_count(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is flushed before the rename that publishes it; the folder that takes its name is flushed after it."""
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def watched_fsync(descriptor: int) -> None:
        events.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def watched(original: Any) -> Any:
        def run(self: Path, target: Any) -> Any:
            found = original(self, target)
            events.append(("renamed", f"{self} {target}"))
            return found

        return run

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched(rename))
    monkeypatch.setattr(Path, "replace", watched(replace))
    output = prepare(recipe(tmp_path / "d", corpus))
    flushed: set[str] = set()
    published = 0
    for kind, what in events:
        if kind == "fsync":
            flushed.add(what)
            continue
        source, target = what.split(" ")
        if Path(target).name.startswith("part-"):
            assert source in flushed
            assert f"{source}/stats.json" in flushed
            published += 1
    assert published > 8
    at = {what: place for place, (_, what) in enumerate(events)}
    manifest = next(place for what, place in at.items() if what.endswith(f" {output}/manifest.json"))
    for shard in output.glob("*/shard-*.tar"):
        (place,) = (place for what, place in at.items() if what.endswith(f" {shard}"))
        assert place < at[str(shard.parent)] < manifest
    assert at[str(output)] > manifest


def test_a_merge_that_was_killed_packs_nothing_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tree(prepare(recipe(tmp_path / "alone", corpus)))
    ours = recipe(tmp_path / "ours", corpus)
    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "Report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(ours)
    monkeypatch.setattr(parts.LocalCores, "run", lambda *_: pytest.fail("nothing was left to do"))
    assert tree(prepare(ours)) == alone


def test_without_hard_links_the_shards_are_moved(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tree(prepare(recipe(tmp_path / "alone", corpus)))

    def no_links(*_: Any) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    ours = recipe(tmp_path / "ours", corpus)
    with monkeypatch.context() as patch:
        patch.setattr(merge_module, "Report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(ours)
    assert tree(prepare(ours)) == alone


def grow(corpus: Path) -> None:
    with corpus.open("ab") as file:
        file.write(b'{"text": "one more"}\n')


def replace_with_the_same_size(corpus: Path) -> None:
    other = corpus.with_name("other")
    other.write_bytes(corpus.read_bytes().replace(b"ta", b"to"))
    os.utime(other, (0, 1_000_000_000))
    other.replace(corpus)


@pytest.mark.parametrize("change", [grow, replace_with_the_same_size, Path.unlink])
@pytest.mark.parametrize("clean", [{}, CLEAN])
@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_an_input_that_changes_during_prep_is_refused(
    tmp_path: Path, change: Callable[[Path], Any], clean: dict[str, Any], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / f"corpus.{suffix}", TEXTS)
    ours = recipe(tmp_path / "d", corpus, source__document="line", **clean)
    ran: list[int] = []
    original = parts._compute

    def compute(stage: Any, job: Any, work: Path, number: int) -> Any:
        ran.append(number)
        if len(ran) == 3:
            change(corpus)
        return original(stage, job, work, number)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "_compute", compute)
        with pytest.raises(BadInput, match=rf"corpus\.{suffix}: it was (changed|deleted) while prep read it"):
            prepare(ours)
    assert len(ran) == 3
    assert not (tmp_path / "d" / "manifest.json").exists()
    if corpus.exists():
        assert tree(prepare(ours)) == tree(
            prepare(recipe(tmp_path / "alone", corpus, source__document="line", **clean))
        )


def command(output: Path, corpus: Path, *overrides: str) -> list[str]:
    prep = [sys.executable, "-m", "sharebert_cli", "prep", "corpus", f"output={output}", f"source.paths={corpus}"]
    return [*prep, "tokenizer.train.vocab_size=600", "seq_len=64", "validation=0.1", "workers=1", *overrides]


def run_all(*commands: list[str]) -> list[tuple[int, str]]:
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
    return [(process.wait(), error) for process in running for _, error in [process.communicate()]]


def test_two_preps_at_once_into_one_folder(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [f"{text} {i}" for i in range(30) for text in TEXTS])
    found = run_all(*[command(tmp_path / "d", corpus)] * 3)
    assert [code for code, _ in found] == [0, 0, 0], found
    assert sum("another prep works in" in error for _, error in found) == 2
    run_all(command(tmp_path / "alone", corpus))
    assert tree(tmp_path / "d") == tree(tmp_path / "alone")
    open_dataset(tmp_path / "d").verify()


def test_two_preps_of_different_recipes_at_once(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [f"{text} {i}" for i in range(30) for text in TEXTS])
    found = run_all(command(tmp_path / "d", corpus), command(tmp_path / "d", corpus, "seq_len=32"))
    assert sorted(code for code, _ in found) == [0, 2], found
    assert any("holds a dataset of another config (seq_len is" in error for _, error in found)
    open_dataset(tmp_path / "d").verify()


@pytest.fixture
def slow_parts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Parts take a while; gives when each began."""
    began: list[float] = []
    original = parts._compute

    def compute(stage: Any, job: Any, work: Path, number: int) -> Any:
        began.append(time.monotonic())
        time.sleep(0.05)
        return original(stage, job, work, number)

    monkeypatch.setattr(parts, "_compute", compute)
    return began


def test_tasks_work_together_and_a_merge_waits_for_them(corpus: Path, tmp_path: Path, slow_parts: list[float]) -> None:
    ours = recipe(tmp_path / "d", corpus)
    alone = tree(prepare(recipe(tmp_path / "alone", corpus)))
    slow_parts.clear()
    tasks = [threading.Thread(target=prepare, args=(ours, (number, 2))) for number in range(2)]
    for task in tasks:
        task.start()
    while not slow_parts:
        time.sleep(0.01)
    assert tree(prepare(ours)) == alone
    for task in tasks:
        task.join()
    assert tree(tmp_path / "d") == alone


def test_a_file_system_without_locks_is_said(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("data_prep.lock.fcntl.flock", flock)
    prepare(recipe(tmp_path / "d", corpus))
    assert "no locks in" in capsys.readouterr().err


def test_an_older_dataset_is_the_same_dataset(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was made before the key source.encoding, and before its manifest told what was in the files."""
    judged = {"clean__evaluation__paths": [corpus], "clean__evaluation__ngram": 3}
    folder = prepare(recipe(tmp_path / "d", corpus, **judged))
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text("utf-8"))
    fingerprint = manifest["fingerprint"]
    del manifest["config"]["source"]["encoding"]
    for key in ("vocabulary", "evaluation_sha256"):
        del manifest[key]
    for source in manifest["sources"]:
        del source["digest"]
    file.write_text(json.dumps(manifest), "utf-8")
    assert open_dataset(folder).fingerprint == fingerprint
    assert "older version" not in capsys.readouterr().err
    assert prepare(recipe(tmp_path / "d", corpus, **judged)) == folder
    assert "older version; whether files changed" in capsys.readouterr().err
