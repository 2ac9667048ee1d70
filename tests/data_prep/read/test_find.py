"""Everything that is found is read once, or named in a line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from made_texts import made_texts, recipe, tree, write_jsonl

from data_prep.pipeline import prepare
from data_prep.read.find import LeftOut, find
from data_prep.read.sources import SourceRecipe, find_inputs
from sharebert_common.errors import BadInput


def names(pattern: str | Path) -> list[str]:
    return [file.name for file in find(str(pattern), LeftOut())]


def write(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}", "utf-8")


def test_links_to_folders_are_read(tmp_path: Path) -> None:
    write(tmp_path, "data/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "data") == ["data/a.txt", "data/link/b.txt", "data/link/deep/c.txt"]
    assert names(tmp_path / "data" / "*") == ["a.txt", "link/b.txt", "link/deep/c.txt"]
    assert names(tmp_path / "data" / "link") == ["link/b.txt", "link/deep/c.txt"]
    assert names(tmp_path / "data" / "**" / "*.txt") == ["a.txt", "link/b.txt", "link/deep/c.txt"]
    assert names(tmp_path / "data" / "**") == ["a.txt", "link/b.txt", "link/deep/c.txt"]


def test_folders_that_a_glob_matches_are_read(tmp_path: Path) -> None:
    write(tmp_path, "news-1/a.txt", "news-2/b/c.txt", "news-3.txt", "other/d.txt")
    assert names(tmp_path / "news-*") == ["news-1/a.txt", "news-2/b/c.txt", "news-3.txt"]


@pytest.mark.parametrize("name", ["[v1]", "what?", "a*b", "x[", "run #7", "50%j", "a=b", "a,b", "{x}"])
def test_existing_paths_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    write(tmp_path, f"{name}/{name}.txt", f"{name}/other.txt", "v/v.txt")
    folder = tmp_path / name
    assert names(folder) == sorted([f"{name}/{name}.txt", f"{name}/other.txt"])
    assert names(folder / f"{name}.txt") == [f"{name}.txt"]
    assert names(folder / "o*.txt") == ["other.txt"]
    corpus = write_jsonl(folder / "c.jsonl", made_texts(200))
    made = prepare(recipe(tmp_path / f"{name}-out", corpus, source__document="line"))
    assert prepare(recipe(tmp_path / f"{name}-out", corpus, source__document="line")) == made


def test_what_is_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "data/a.txt", "data/.hidden.txt", "data/.git/config", "data/b.txt", "data/sub/c.txt")
    (tmp_path / "data" / "broken.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "data" / "again.txt").symlink_to(tmp_path / "data" / "b.txt")
    (tmp_path / "data" / "sub" / "up").symlink_to(tmp_path / "data")
    os.mkfifo(tmp_path / "data" / "pipe.txt")
    paths = [str(tmp_path / "data"), str(tmp_path / "data" / "a.txt"), str(tmp_path / "data" / "sub" / "*.txt")]
    inputs = find_inputs(SourceRecipe(paths=paths))
    assert [item.name for item in inputs] == ["data/a.txt", "data/again.txt", "data/sub/c.txt"]
    said = capsys.readouterr().err
    data = tmp_path / "data"
    assert f"prep: left out (hidden): {data}/.git, {data}/.hidden.txt\n" in said
    assert f"prep: left out (a broken link): {data}/broken.txt\n" in said
    assert f"prep: left out (a link to a folder above it): {data}/sub/up\n" in said
    assert f"prep: left out (neither a file nor a folder): {data}/pipe.txt\n" in said
    assert f"prep: left out (found twice): {data}/b.txt, {data}/a.txt, {data}/sub/c.txt\n" in said


def test_a_hidden_path_that_is_asked_for_is_read(tmp_path: Path) -> None:
    write(tmp_path, ".corpus/a.txt", ".corpus/.b.txt", ".c.txt")
    assert names(tmp_path / ".corpus") == [".corpus/a.txt"]
    assert names(tmp_path / ".c.txt") == [".c.txt"]


def test_nothing_but_what_is_left_out_is_an_error_that_says_so(tmp_path: Path) -> None:
    write(tmp_path, "data/.a.txt")
    with pytest.raises(BadInput, match=r"data: no such file \(left out \(hidden\): .*/data/\.a\.txt\)"):
        find_inputs(SourceRecipe(paths=str(tmp_path / "data")))


def test_many_paths_of_one_reason_share_a_line(tmp_path: Path) -> None:
    write(tmp_path, *(f"data/.{number}.txt" for number in range(8)), "data/a.txt")
    left_out = LeftOut()
    find(str(tmp_path / "data"), left_out)
    (line,) = left_out.lines()
    assert line.endswith(".4.txt and 3 more")


def test_the_output_folder_may_lie_in_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "data"
    source.mkdir()
    write_jsonl(source / "c.jsonl", made_texts(200))
    alone = tree(prepare(recipe(tmp_path / "alone", source)))
    for _ in range(2):  # the second time there is a dataset in it
        assert tree(prepare(recipe(source / "out", source))) == alone
    assert f"left out (in the output folder): {source}/out/" in capsys.readouterr().err


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", made_texts(200))
    alone = prepare(recipe(tmp_path / "alone", corpus))
    twice = prepare(recipe(tmp_path / "twice", [corpus, tmp_path / "*.jsonl"]))
    assert (twice / "manifest.json").read_text() == (alone / "manifest.json").read_text()


def test_a_file_url_is_the_path_that_it_names(tmp_path: Path) -> None:
    file = tmp_path / "a file.txt"
    file.write_text("words\n")
    found = find_inputs(SourceRecipe(paths=[str(file), file.as_uri()]))
    assert [item.location for item in found] == [str(file)]
