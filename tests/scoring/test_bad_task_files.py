"""What is refused, skipped or left out of task files: bad rows, labels, lines, encodings, and words in YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from made_tasks import sst2, write_tsv

from scoring.data import load_task
from scoring.recipe import EvaluateRecipe, TaskDataRecipe
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load


def at(path: Path, **keys: Any) -> TaskDataRecipe:
    return TaskDataRecipe(path=str(path), **keys)


HEAD = ("sentence", "label")


def test_a_field_that_is_missing_is_not_an_empty_text(tmp_path: Path) -> None:
    """As in a file of MRPC whose last row was cut short."""
    header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    for split in ("train", "dev"):
        write_tsv(tmp_path / f"{split}.tsv", header, [(1, 1, 2, "a", ""), (0, 3, 4, "c", "d")])
    assert load_task("mrpc", at(tmp_path)).train.texts == [("a", ""), ("c", "d")]
    with (tmp_path / "train.tsv").open("a") as file:
        file.write("\n1\t5\t6\tcut sh")
    with pytest.raises(BadInput, match=r"train\.tsv, line 5: no value in column '#2 String' .*bad_rows=skip"):
        load_task("mrpc", at(tmp_path))
    data = load_task("mrpc", at(tmp_path, bad_rows="skip"))
    assert data.train.texts == [("a", ""), ("c", "d")]
    assert data.skipped == {str(tmp_path / "train.tsv"): 1}
    empty, bad = data.notes
    assert empty.endswith("train.tsv: empty lines left out: 1 (line 4)")
    assert bad.endswith("train.tsv: bad rows skipped: 1; the first is line 5: no value in column '#2 String'")


def test_a_short_row_is_whole_if_it_has_all_columns_that_count(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        write_tsv(tmp_path / f"{split}.tsv", ("sentence", "label", "remark"), [("a", 1), ("b", 0, "x")])
    assert load_task("sst2", at(tmp_path)).train.labels.tolist() == [1, 0]


def test_broken_rows_of_qqp_are_skipped_and_counted(tmp_path: Path) -> None:
    """Its train file has line breaks inside rows."""
    header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
    good = [(i, 2 * i, 2 * i + 1, f"a{i}", f"b{i}", i % 2) for i in range(8)]
    broken = [(90, 180, 181, "the first half"), ("second half", "question two", 1), (91, 182, 183, "a", "b", 1, "x")]
    write_tsv(tmp_path / "train.tsv", header, [*good[:4], *broken, *good[4:]])
    write_tsv(tmp_path / "dev.tsv", header, good)
    with pytest.raises(BadInput, match=r"train\.tsv, line 8: 7 fields, but the file has 6 columns"):
        load_task("qqp", at(tmp_path))
    data = load_task("qqp", at(tmp_path, bad_rows="skip"))
    assert data.train.texts == [(f"a{i}", f"b{i}") for i in range(8)]
    assert data.skipped == {str(tmp_path / "train.tsv"): 3}
    write_tsv(tmp_path / "dev.tsv", header, broken)
    with pytest.raises(BadInput, match=r"dev\.tsv: bad rows skipped: 3; the first is line"):
        load_task("qqp", at(tmp_path, bad_rows="skip"))


@pytest.mark.parametrize("text", [["a", "b"], 7, None, {"a": 1}, True, 1.5])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_only_a_text_is_a_text(tmp_path: Path, kind: str, text: object) -> None:
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        rows = [{"text": "w1", "label": i % 2} for i in range(20)] + [{"text": text, "label": 1}]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        place = "line 21"
    else:
        pandas.DataFrame({"text": [text] * 20, "label": [0, 1] * 10}).to_parquet(file)
        place = "row 1"
    with pytest.raises(BadInput, match=rf"rows\.{kind}, {place}: (no value in )?column 'text'"):
        load_task("mine", at(file, text="text"))
    if kind == "jsonl":
        data = load_task("mine", at(file, text="text", bad_rows="skip"))
        assert len(data.train) + len(data.held_out["dev"]) == 20


@pytest.mark.parametrize("mark", ["", "null", "?", -1, "-", "NaN"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_test_file_without_labels_is_left_out(tmp_path: Path, kind: str, mark: object) -> None:
    folder = sst2(tmp_path, train=20, dev=10)
    if kind == "tsv":
        write_tsv(folder / "test.tsv", HEAD, [("a", mark), ("b", mark)])
    elif kind == "csv":
        (folder / "test.csv").write_text(f"sentence,label\na,{mark}\nb,{mark}\n")
    else:
        value = None if mark == "null" else mark
        (folder / "test.jsonl").write_text("".join(json.dumps({"sentence": t, "label": value}) + "\n" for t in "ab"))
    data = load_task("sst2", at(folder))
    assert list(data.held_out) == ["dev"]
    assert f"test.{kind}: has no label in any row of its column 'label', so test is not scored" in data.notes[0]


@pytest.mark.parametrize("header", [HEAD, ("index", "sentence")])
@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_test_file_without_rows_is_left_out(tmp_path: Path, kind: str, header: tuple[str, ...]) -> None:
    folder = sst2(tmp_path, train=20, dev=10)
    file = folder / f"test.{kind}"
    if kind == "parquet":
        pandas.DataFrame({name: [] for name in header}).to_parquet(file)
    else:
        file.write_text({"csv": ",", "tsv": "\t"}[kind].join(header) + "\n")
    data = load_task("sst2", at(folder))
    assert list(data.held_out) == ["dev"]
    assert data.notes == [f"{file}: has no rows, so test is not scored"]


def test_an_empty_test_file_is_refused(tmp_path: Path) -> None:
    folder = sst2(tmp_path, train=20, dev=10)
    (folder / "test.tsv").write_text("")
    with pytest.raises(BadInput, match=r"test\.tsv: not readable as tsv \(the file is empty\)"):
        load_task("sst2", at(folder))


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize(("label", "what"), [([1], "a list"), ({"a": 1}, "an object")])
def test_a_label_that_is_no_word_or_number(tmp_path: Path, label: object, what: str, regression: bool) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for _ in range(20)))
    with pytest.raises(BadInput, match=rf"rows\.jsonl, line 1: the label is {what}, not one word or number"):
        load_task("mine", at(file, text=["text"], label="label", regression=regression))


def test_a_label_that_is_listed_twice(tmp_path: Path) -> None:
    for name, labels in (("mine", ["a", "b", "a"]), ("sst2", ["x", "x"])):
        with pytest.raises(BadInput, match=rf"data\.labels: '{labels[0]}' is listed twice"):
            load_task(name, at(sst2(tmp_path), text=["sentence"], labels=labels))


def test_a_test_file_that_lacks_some_labels_is_refused(tmp_path: Path) -> None:
    folder = sst2(tmp_path, train=20, dev=10)
    write_tsv(folder / "test.tsv", HEAD, [("a", 1), ("b", "?"), ("c", 0)])
    with pytest.raises(BadInput, match=r"test\.tsv, line 3: label '\?' is not one of"):
        load_task("sst2", at(folder))
    assert load_task("sst2", at(folder, bad_rows="skip")).held_out["test"].texts == [("a",), ("c",)]


def test_labels_come_from_all_rows_of_one_file(tmp_path: Path) -> None:
    """Some seeds hold out the only row of a class."""
    for rare in range(40):
        labels = ["rare" if row == rare else ("blue", "red")[row % 2] for row in range(40)]
        file = tmp_path / "rows.csv"
        pandas.DataFrame({"review": ["a"] * 40, "stars": labels}).to_csv(file, index=False)
        data = load_task("reviews", at(file, text="review", label="stars"))
        assert data.task.labels == ("blue", "rare", "red")
        held_out = 1 in data.held_out["dev"].labels
        assert data.notes == ([f"{file}: no train row has the label rare"] if held_out else [])


def test_an_empty_field_is_no_label(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("review,stars\n" + "a,x\nb,y\n" * 10 + "c,\n")
    with pytest.raises(BadInput, match=r"rows\.csv, line 22: label '' is not one of x, y"):
        load_task("reviews", at(file, text="review", label="stars"))


def test_too_few_train_rows_for_two_labels(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="all train rows have the same label"):
        load_task("sst2", at(sst2(tmp_path), train_rows=1))


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("data.labels=[0,1]", "a number (0)"),
        ("data.labels=[yes,no]", "true or false (True)"),
        ("data.labels=[1.5,x]", "a number (1.5)"),
        ("data.labels=[null,x]", "null (None)"),
        ("data.header=[1,2]", "a number (1)"),
        ("data.text=5", "a number (5)"),
    ],
)
def test_words_that_yaml_reads_as_something_else(override: str, read: str) -> None:
    with pytest.raises(BadInput) as raised:
        load(EvaluateRecipe, None, ["task=mine", override])
    assert f"{override.split('=')[0]}" in str(raised.value)
    assert f"YAML reads this as {read}" in str(raised.value)
    assert """'key=["yes","no"]' on the command line""" in str(raised.value)


def test_quoted_words_are_words() -> None:
    recipe = load(EvaluateRecipe, None, ["task=mine", 'data.labels=["yes","no"]', "data.header=['0','1']"])
    assert recipe.data.labels == ["yes", "no"]
    assert recipe.data.header == ["0", "1"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b", "\x0c", "\r"])
@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path, kind: str, separator: str) -> None:
    text = f"one{separator}row"
    for split in ("train", "dev"):
        lines = {
            "tsv": ["sentence\tlabel", f"{text}\t1", "b\t0"],
            "csv": ["sentence,label", f'"{text}",1', "b,0"],
            "jsonl": [f'{{"sentence": {json.dumps(text, ensure_ascii=separator < " ")}, "label": 1}}',
                      '{"sentence": "b", "label": 0}'],
        }[kind]  # fmt: skip
        for end in ("\n", "\r\n"):
            data = "".join(line + end for line in lines)
            (tmp_path / f"{split}.{kind}").write_bytes(b"\xef\xbb\xbf" + data.encode())
    assert load_task("sst2", at(tmp_path)).train.texts == [(text,), ("b",)]


def test_files_in_other_encodings_are_refused_with_their_name(tmp_path: Path) -> None:
    folder = sst2(tmp_path, train=20, dev=10)
    text = (folder / "dev.tsv").read_text()
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"):
        (folder / "dev.tsv").write_bytes(text.encode(encoding))
        name = encoding.upper()[:6]
        with pytest.raises(BadInput, match=rf"dev\.tsv: not readable as tsv \(it looks like {name}, .*iconv -f {name}"):
            load_task("sst2", at(folder))
    (folder / "dev.tsv").write_bytes(text.encode() + "caf\u00e9\t1\n".encode("latin-1"))
    with pytest.raises(BadInput, match=r"dev\.tsv: .*byte 0xe9 on line 12 is not UTF-8; .*iconv -f LATIN1"):
        load_task("sst2", at(folder))


def test_a_csv_with_an_open_quote_names_its_line(tmp_path: Path) -> None:
    folder = sst2(tmp_path, train=20, dev=10)
    (folder / "dev.tsv").unlink()
    (folder / "dev.csv").write_text('sentence,label\n"a\nb",1\n\n"c,0\nd,1\n')
    with pytest.raises(BadInput, match=r"dev\.csv, line 5: not readable as csv \(unexpected end of data\)"):
        load_task("sst2", at(folder))
    assert load_task("sst2", at(folder, bad_rows="skip")).held_out["dev"].texts == [("a\nb",)]


REFUSED: list[tuple[tuple[str, ...], list[tuple[object, ...]], str]] = [
    (("sentence", "lable"), [("a", 1)], r"dev\.tsv: no column 'label'; did you mean 'lable'\? .*data\.label"),
    (("text", "label"), [("a", 1)], r"dev\.tsv: no column 'sentence'.*data\.text"),
    (HEAD, [("a", 1), ("b", "odd")], r"dev\.tsv, line 3: label 'odd' is not one of negative, positive, nor of 0 to 1"),
    (HEAD, [("a", 1), ("b", 2)], r"dev\.tsv, line 3: label '2' is not one of"),
    (HEAD, [("a", 1), ("b", "")], r"dev\.tsv, line 3: label '' is not one of"),
    (HEAD, [("a", 1), ("b",)], r"dev\.tsv, line 3: no value in column 'label' \(data\.bad_rows=skip"),
    (HEAD, [("a", 1), ("b", 1, "more")], r"dev\.tsv, line 3: 3 fields, but the file has 2 columns"),
    (HEAD, [("a", 1, "more"), ("b", 1, "more")], r"dev\.tsv, line 2: 3 fields, but the file has 2"),
    (HEAD, [], r"dev\.tsv: has no rows"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "values", "message"), REFUSED)
def test_bad_files(tmp_path: Path, header: tuple[str, ...], values: list[tuple[object, ...]], message: str) -> None:
    write_tsv(sst2(tmp_path) / "dev.tsv", header, values)
    with pytest.raises(BadInput, match=message) as raised:
        load_task("sst2", at(tmp_path))
    assert "\n" not in str(raised.value)


def test_bad_folders_and_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file or folder"):
        load_task("sst2", at(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match=r"there is no train\.\{tsv,csv,parquet,jsonl\} in it"):
        load_task("sst2", at(tmp_path))
    folder = sst2(tmp_path)
    (folder / "dev.csv").write_text("sentence,label\n")
    with pytest.raises(BadInput, match=r"both dev\.tsv and dev\.csv could be dev; remove one"):
        load_task("sst2", at(folder))
    (folder / "dev.tsv").unlink()
    (folder / "dev.csv").write_bytes(b"")
    with pytest.raises(BadInput, match=r"dev\.csv: not readable as csv"):
        load_task("sst2", at(folder))
    (folder / "dev.csv").unlink()
    for suffix in ("parquet", "jsonl", "tsv"):
        (folder / f"dev.{suffix}").write_bytes(b'{"sentence": \xff\xfe')
        with pytest.raises(BadInput, match=rf"dev\.{suffix}: not readable as {suffix}"):
            load_task("sst2", at(folder))
        (folder / f"dev.{suffix}").unlink()


def test_bad_choices(tmp_path: Path) -> None:
    folder = sst2(tmp_path)
    with pytest.raises(BadInput, match="no task 'sst-2'; did you mean 'sst2'"):
        load_task("sst-2", at(folder))
    with pytest.raises(BadInput, match=r"so data\.path must say"):
        load_task("mine", TaskDataRecipe(text=["sentence"]))
    with pytest.raises(BadInput, match=r"data\.text: sst2 takes 1 columns \(got 2\)"):
        load_task("sst2", at(folder, text=["sentence", "label"]))
    with pytest.raises(BadInput, match=r"data\.labels: sst2 has 2 labels"):
        load_task("sst2", at(folder, labels=["a"]))
    write_tsv(folder / "train.tsv", HEAD, [("a", 1), ("b", 1)])
    with pytest.raises(BadInput, match="all train rows have the same label"):
        load_task("sst2", at(folder))
    write_tsv(folder / "train.tsv", (), [("a", 1), ("b", 1)])
    with pytest.raises(BadInput, match=r"first line has 2 columns, data\.header names 3"):
        load_task("sst2", at(folder, header=["sentence", "x", "label"]))
    write_tsv(folder / "train.tsv", ("sentence1", "sentence2", "label"), [("a", "b", "high")])
    with pytest.raises(BadInput, match=r"train\.tsv, line 2: label 'high' is not a number"):
        load_task("stsb", at(folder, label="label"))
