"""A task with its rows, from files or from the hub: texts, and labels as numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoring.labels import has_labels, label_numbers, labels_of
from scoring.recipe import TaskDataRecipe
from scoring.tables import SUFFIXES, Table, find_table, read_table
from scoring.tasks import HUB, Task, choose_task
from sharebert_common.errors import BadInput

TRAIN, TEST = "train", "test"
SHUFFLE_SEED = 0
"""Draws the subsets of rows: they are the same for every model, seed and machine."""

Texts = list[tuple[str, ...]]
"""One text a row, or two."""


@dataclass(frozen=True)
class Split:
    """The rows of one split."""

    where: str
    """Its file, or its name on the hub."""
    texts: Texts
    labels: NDArray[Any]
    """[N]: int64 numbers of labels, or float64 for regression."""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | NDArray[Any]) -> Split:
        """A split of some of its rows."""
        return Split(self.where, [self.texts[row] for row in rows], self.labels[rows])


@dataclass(frozen=True)
class TaskData:
    """A task with its rows."""

    task: Task
    """The task with all its labels, also if they were read from train."""
    train: Split
    held_out: dict[str, Split]
    """The splits to score, by name: the dev splits, and test if it has labels."""

    @property
    def dev(self) -> list[str]:
        """The splits that a sweep compares learning rates on."""
        return [name for name in self.held_out if name != TEST]


def load_task(name: str, recipe: TaskDataRecipe) -> TaskData:
    """Read a task.

    Raises BadInput, naming file, row and column: an unknown task, files or columns that are missing, unknown labels.
    """
    task = choose_task(name, recipe)
    tables = _from_hub(task) if recipe.path is None else _from_files(task, recipe, Path(recipe.path))
    if not task.labels and not task.regression:
        task = dataclasses.replace(task, labels=labels_of(tables[TRAIN].column(task.label, "data.label")))
    splits = {split: _split(table, task) for split, table in tables.items() if split != TEST}
    if TEST in tables and has_labels(tables[TEST], task):
        splits[TEST] = _split(tables[TEST], task)
    train = splits.pop(TRAIN)
    if not task.regression and len(set(train.labels.tolist())) < 2:
        raise BadInput(f"{train.where}: all rows have the same label; there is nothing to learn")
    if recipe.train_rows is not None and recipe.train_rows < len(train):
        train = train.take(_shuffled(len(train))[: recipe.train_rows])
    return TaskData(task, train, splits)


def _from_files(task: Task, recipe: TaskDataRecipe, path: Path) -> dict[str, Table]:
    wanted = [name for names in (*task.text, task.label) for name in names]
    if path.is_file():
        return _divided(read_table(path, task.header, wanted), recipe.held_out)
    if not path.is_dir():
        raise BadInput(f"data.path: {path}: no such file or folder")
    tables = {}
    for split in (TRAIN, *task.dev, TEST):
        file = find_table(path, split)
        if file is not None:
            tables[split] = read_table(file, task.header, wanted)
        elif split != TEST:
            kinds = ",".join(suffix[1:] for suffix in SUFFIXES)
            raise BadInput(f"data.path: {path}: there is no {split}.{{{kinds}}} in it")
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
    except Exception as error:  # any error of the network, the hub or the cache
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"{HUB}, {task.name}: cannot be loaded from the hub ({cause}); to read files instead: --data FOLDER"
        ) from error
    names = {TRAIN: TRAIN, **{split: split.replace("dev", "validation") for split in task.dev}}
    return {split: Table(f"{HUB}, {task.name}, {name}", splits[name].to_pandas()) for split, name in names.items()}


def _split(table: Table, task: Task) -> Split:
    columns = [table.column(names, f"data.text for column {i}") for i, names in enumerate(task.text, 1)]
    labels = table.column(task.label, "data.label")
    return Split(table.where, list(zip(*columns, strict=True)), label_numbers(table, labels, task))


def _shuffled(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(SHUFFLE_SEED).permutation(count)
