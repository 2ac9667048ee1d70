"""The rows of a task, from files or from the hub: texts, and labels as numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoring.recipe import DataConfig
from scoring.tables import SUFFIXES, Table, find_table, read_table
from scoring.tasks import HUB, TASKS, Task
from sharebert_common.errors import BadInput, nearest

TRAIN, TEST = "train", "test"
SHUFFLE_SEED = 0  # of subsets: the same rows for every model, seed and machine

Texts = list[tuple[str, ...]]
"""One text a row, or two."""


@dataclass(frozen=True)
class Split:
    """Rows of one split."""

    where: str
    """Its file, or its name on the hub."""
    texts: Texts
    labels: NDArray[Any]
    """[N]: int64 numbers of labels, or float64 for regression."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | NDArray[Any]) -> Split:
        """Some of its rows."""
        return Split(self.where, [self.texts[row] for row in rows], self.labels[rows])


@dataclass(frozen=True)
class TaskData:
    """A task with its rows."""

    task: Task
    """With its labels, also where train had to be read for them."""
    train: Split
    held_out: dict[str, Split]
    """What is scored, by name: the dev splits, and test where it has labels."""

    @property
    def dev(self) -> list[str]:
        """The splits that a sweep goes by."""
        return [name for name in self.held_out if name != TEST]


def load_task(name: str, config: DataConfig) -> TaskData:
    """Read a task.

    Raises BadInput, naming file, row and column: an unknown task, files or columns that are missing, unknown labels.
    """
    task = choose_task(name, config)
    tables = _from_hub(task) if config.path is None else _from_files(task, config, Path(config.path))
    if not task.labels and not task.regression:
        task = dataclasses.replace(task, labels=_labels_of(tables[TRAIN].column(task.label, "data.label")))
    splits = {split: _split(table, task) for split, table in tables.items() if split != TEST}
    if TEST in tables and _has_labels(tables[TEST], task):
        splits[TEST] = _split(tables[TEST], task)
    train = splits.pop(TRAIN)
    if not task.regression and len(set(train.labels.tolist())) < 2:
        raise BadInput(f"{train.where}: all rows have the same label; there is nothing to learn")
    if config.train_rows is not None and config.train_rows < len(train):
        train = train.take(_shuffled(len(train))[: config.train_rows])
    return TaskData(task, train, splits)


def choose_task(name: str, config: DataConfig) -> Task:
    """A task of GLUE with the columns of the config, or one that the config describes alone.

    Raises BadInput: no task of GLUE, and the config does not say which columns count.
    """
    task = TASKS.get(name)
    if task is None:
        if not config.text:
            known = ", ".join(sorted(TASKS))
            raise BadInput(
                f"task: no task '{name}'{nearest(name, TASKS)} (tasks: {known}; for one of your own say "
                "data.path=… data.text=… data.label=…)"
            )
        if config.path is None:
            raise BadInput(f"task: '{name}' is your own, so data.path must say where its rows are")
        metrics = ("pearson", "spearman") if config.regression else ("accuracy",)
        task = Task(name, text=(), metrics=metrics, regression=config.regression)
    elif config.regression and not task.regression:
        raise BadInput(f"data.regression: {name} has labels; give a task of your own another name")
    if config.text:
        if task.text and len(task.text) != len(config.text):
            raise BadInput(f"data.text: {name} takes {len(task.text)} columns (got {len(config.text)})")
        task = dataclasses.replace(task, text=tuple((column,) for column in config.text))
    if config.label:
        task = dataclasses.replace(task, label=(config.label,))
    if config.header:
        task = dataclasses.replace(task, header=tuple(config.header))
    if config.labels:
        if task.labels and len(task.labels) != len(config.labels):
            raise BadInput(f"data.labels: {name} has {len(task.labels)} labels (got {len(config.labels)})")
        task = dataclasses.replace(task, labels=tuple(config.labels))
    return task


def _from_files(task: Task, config: DataConfig, path: Path) -> dict[str, Table]:
    wanted = [name for names in (*task.text, task.label) for name in names]
    if path.is_file():
        return _divided(read_table(path, task.header, wanted), config.held_out)
    if not path.is_dir():
        raise BadInput(f"data.path: {path}: no such file or folder")
    tables = {}
    for split in (TRAIN, *task.dev, TEST):
        file = find_table(path, split)
        if file is not None:
            tables[split] = read_table(file, task.header, wanted)
        elif split != TEST:
            kinds = ",".join(suffix[1:] for suffix in SUFFIXES)
            raise BadInput(f"data.path: {path}: holds no {split}.{{{kinds}}}")
    return tables


def _divided(table: Table, held_out: float) -> dict[str, Table]:
    """One file as train and dev."""
    rows = _shuffled(len(table))
    count = max(1, round(held_out * len(rows)))
    if count == len(rows):
        raise BadInput(f"{table.where}: {len(rows)} rows are too few to hold some of them out")
    return {TRAIN: table.take(np.sort(rows[count:])), "dev": table.take(np.sort(rows[:count]))}


def _from_hub(task: Task) -> dict[str, Table]:
    import datasets

    try:
        splits = datasets.load_dataset(HUB, task.name)
    except Exception as error:  # whatever the network, the hub or the cache make of it
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"{HUB}, {task.name}: not to be had from the hub ({cause}); with files of your own: --data FOLDER"
        ) from error
    names = {TRAIN: TRAIN, **{split: split.replace("dev", "validation") for split in task.dev}}
    return {split: Table(f"{HUB}, {task.name}, {name}", splits[name].to_pandas()) for split, name in names.items()}


def _split(table: Table, task: Task) -> Split:
    columns = [table.column(names, f"data.text for column {i}") for i, names in enumerate(task.text, 1)]
    labels = table.column(task.label, "data.label")
    return Split(table.where, list(zip(*columns, strict=True)), _numbers(table, labels, task))


def _numbers(table: Table, labels: Sequence[str], task: Task) -> NDArray[Any]:
    if task.regression:
        values = np.array([_number(label) for label in labels])
        if len(bad := (~np.isfinite(values)).nonzero()[0]):
            raise BadInput(f"{table.place(int(bad[0]))}: label '{labels[bad[0]]}' is no number")
        return values
    known = {str(number): number for number in range(len(task.labels))} if task.name in TASKS else {}
    known |= {label: number for number, label in enumerate(task.labels)}
    for row, label in enumerate(labels):
        if label not in known:
            raise BadInput(
                f"{table.place(row)}: label '{label}' is none of {', '.join(task.labels)}"
                + (f", nor of 0 to {len(task.labels) - 1}" if task.name in TASKS else "")
            )
    return np.array([known[label] for label in labels], dtype=np.int64)


def _has_labels(test: Table, task: Task) -> bool:
    """GLUE's own test sets have no labels, or -1 for all."""
    return test.has(task.label) and set(test.column(task.label, "data.label")) != {"-1"}


def _labels_of(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels that occur: numbers in their order, words in the alphabet's."""
    found = set(labels)
    if all(isfinite(_number(label)) for label in found):
        return tuple(sorted(found, key=float))
    return tuple(sorted(found))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _shuffled(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(SHUFFLE_SEED).permutation(count)
