"""Reading tasks: four kinds of files, GLUE's own layouts, the hub, and own tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from made_tasks import sst2, write_tsv

from scoring.data import load_task
from scoring.recipe import TaskDataRecipe
from sharebert_common.errors import BadInput

FRAME = pandas.DataFrame({"sentence": ['a "quoted, text', "None", "c d"], "label": [1, 0, 1]})


def at(path: Path, **keys: Any) -> TaskDataRecipe:
    return TaskDataRecipe(path=str(path), **keys)


@pytest.mark.parametrize("suffix", ["tsv", "csv", "parquet", "jsonl"])
def test_four_kinds_of_files_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "dev"):
        path = tmp_path / f"{split}.{suffix}"
        if suffix == "tsv":
            write_tsv(path, list(FRAME.columns), FRAME.values.tolist())
        elif suffix == "csv":
            FRAME.to_csv(path, index=False)
        elif suffix == "parquet":
            FRAME.to_parquet(path)
        else:
            FRAME.to_json(path, orient="records", lines=True)
    data = load_task("sst2", at(tmp_path))
    assert data.train.texts == [('a "quoted, text',), ("None",), ("c d",)]
    assert data.train.labels.tolist() == data.held_out["dev"].labels.tolist() == [1, 0, 1]


def pairs(header: str, *labels: object) -> tuple[list[str], list[list[object]]]:
    """A file's header and two rows: `index`, two texts, label."""
    return header.split(","), [[7, "a", "b", labels[0]], [8, "c", "d", labels[1]]]


SENTENCES = "index,sentence1,sentence2,label"
LAYOUTS: list[tuple[str, tuple[list[str], list[list[object]]], list[float]]] = [
    ("cola", ([], [["gj04", 0, "*", "a b"], ["gj04", 1, "", "c"]]), [0, 1]),
    ("mrpc", (["\ufeffQuality", "#1 ID", "#1 String", "#2 String"], [[1, 7, "a", "b"], [0, 7, "c", "d"]]), [1, 0]),
    ("stsb", pairs("index,sentence1,sentence2,score", "4.250", "0"), [4.25, 0]),
    ("qqp", pairs("id,question1,question2,is_duplicate", 1, 0), [1, 0]),
    ("qnli", pairs("index,question,sentence,label", "not_entailment", "entailment"), [1, 0]),
    ("rte", pairs(SENTENCES, "entailment", "not_entailment"), [0, 1]),
    ("wnli", pairs(SENTENCES, 1, 0), [1, 0]),
    ("mnli", pairs("index,sentence1,sentence2,gold_label", "contradiction", "neutral"), [2, 1]),
]


@pytest.mark.parametrize(("task", "file", "labels"), LAYOUTS, ids=[layout[0] for layout in LAYOUTS])
def test_the_layouts_of_glue(
    tmp_path: Path, task: str, file: tuple[list[str], list[list[object]]], labels: list[float]
) -> None:
    dev = ["dev_matched", "dev_mismatched"] if task == "mnli" else ["dev"]
    for split in ("train", *dev):
        write_tsv(tmp_path / f"{split}.tsv", *file)
    data = load_task(task, at(tmp_path))
    assert data.train.labels.tolist() == labels
    assert data.dev == dev
    if task != "cola":
        assert data.train.texts == [("a", "b"), ("c", "d")]
    else:
        assert data.train.texts == [("a b",), ("c",)]


def test_a_test_split_counts_where_it_has_labels(tmp_path: Path) -> None:
    folder = sst2(tmp_path)
    write_tsv(folder / "test.tsv", ("index", "sentence"), [(0, "w1")])
    assert list(load_task("sst2", at(folder)).held_out) == ["dev"]
    write_tsv(folder / "test.tsv", ("sentence", "label"), [("w1", -1), ("w2", -1)])
    assert list(load_task("sst2", at(folder)).held_out) == ["dev"]
    write_tsv(folder / "test.tsv", ("sentence", "label"), [("w1", 1), ("w2", 0)])
    data = load_task("sst2", at(folder))
    assert list(data.held_out) == ["dev", "test"]
    assert data.dev == ["dev"]


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    split = datasets.Dataset.from_dict(
        {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, 0], "idx": [0, 1]}
    )
    asked = []

    def load_dataset(*names: str) -> Any:
        asked.append(names)
        names_of_splits = ("train", "validation_matched", "validation_mismatched", "test_matched")
        return datasets.DatasetDict(dict.fromkeys(names_of_splits, split))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_task("mnli", TaskDataRecipe())
    assert asked == [("nyu-mll/glue", "mnli")]
    assert data.dev == ["dev_matched", "dev_mismatched"]
    assert data.train.texts == [("a", "c"), ("b", "d")]
    assert data.train.labels.tolist() == [2, 0]

    def no_network(*_: str) -> Any:
        raise ConnectionError("Couldn't reach the hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(
        BadInput, match=r"mnli: cannot be loaded from the hub \(Couldn't reach the hub\).*--data FOLDER"
    ):
        load_task("mnli", TaskDataRecipe())


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    """One file: the same rows are held out each time, and the labels are those that occur."""
    file = tmp_path / "reviews.csv"
    pandas.DataFrame({"review": [f"text {i}" for i in range(40)], "stars": ["good", "bad"] * 20}).to_csv(
        file, index=False
    )
    config = at(file, text="review", label="stars", held_out=0.25)
    data = load_task("reviews", config)
    assert data.task.labels == ("bad", "good")
    assert (len(data.train), len(data.held_out["dev"])) == (30, 10)
    assert not {*data.train.texts} & {*data.held_out["dev"].texts}
    assert load_task("reviews", config).train.texts == data.train.texts
    for (text,), label in zip(data.train.texts, data.train.labels, strict=True):
        assert label == 1 - int(text.split()[1]) % 2


def test_numbered_labels_of_ones_own_keep_their_order(tmp_path: Path) -> None:
    file = tmp_path / "stars.jsonl"
    pandas.DataFrame({"t": ["a"] * 12, "stars": [1, 10, 2] * 4}).to_json(file, orient="records", lines=True)
    assert load_task("stars", at(file, text="t", label="stars")).task.labels == ("1", "2", "10")
    data = load_task("stars", at(file, text="t", label="stars", regression=True))
    assert data.task.metrics == ("pearson", "spearman")
    assert data.train.labels.dtype == np.float64


def test_some_rows_of_train(tmp_path: Path) -> None:
    folder = sst2(tmp_path)
    some = load_task("sst2", at(folder, train_rows=50)).train
    assert len(some) == 50
    assert some.texts == load_task("sst2", at(folder, train_rows=50)).train.texts
    assert len(load_task("sst2", at(folder, train_rows=5000)).train) == 320
