"""A task with its rows, from files or from the hub: texts, and labels as numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoring.labels import LabelNumbers, is_unlabelled, labels_of
from scoring.recipe import TaskDataRecipe
from scoring.table_files import SUFFIXES, find_table, read_table
from scoring.tables import BadRows, Table, is_missing
from scoring.tasks import HUB, Task, choose_task
from sharebert_common.errors import BadInput

TRAIN, TEST = "train", "test"
SHUFFLE_SEED = 0
"""Draws the subsets of rows: they are the same for every model, seed and machine."""

KINDS = {list: "a list", dict: "an object", int: "a number", float: "a number", bool: "true or false"}

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
    skipped: dict[str, int] = field(default_factory=dict)
    """File → the number of its bad rows, if any were skipped."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user: what was left out, and where."""

    @property
    def dev(self) -> list[str]:
        """The splits that a sweep compares learning rates on."""
        return [name for name in self.held_out if name != TEST]


def load_task(name: str, recipe: TaskDataRecipe) -> TaskData:
    """Read a task.

    Raises BadInput, naming file, row and column: an unknown task, files or columns that are missing, unknown labels.
    """
    task = choose_task(name, recipe)
    tables = _from_hub(task, recipe) if recipe.path is None else _from_files(task, recipe, Path(recipe.path))
    if not task.labels and not task.regression:
        task = dataclasses.replace(task, labels=labels_of(tables[TRAIN].column(task.label, "data.label")[1]))
    notes = []
    if TEST in tables and (why := _why_left_out(tables[TEST], task)):
        notes.append(f"{tables[TEST].where}: {why}, so test is not scored")
        del tables[TEST]
    splits = {split: _split(table, task) for split, table in tables.items()}
    if recipe.path is not None and Path(recipe.path).is_file():
        splits = _divided(splits[TRAIN], recipe.held_out)
    train = splits.pop(TRAIN)
    if recipe.train_rows is not None and recipe.train_rows < len(train):
        train = train.take(_shuffled(len(train))[: recipe.train_rows])
    if not task.regression:
        notes += _check_labels(task, train)
    for table in tables.values():
        if table.empty_lines:
            shown = ", ".join(str(line) for line in table.empty_lines[:5])
            more = ", …" if len(table.empty_lines) > 5 else ""
            notes.append(f"{table.where}: empty lines left out: {len(table.empty_lines)} (line {shown}{more})")
        if table.bad_rows.places:
            notes.append(table.bad_rows.note())
    skipped = {table.where: len(table.bad_rows.places) for table in tables.values() if table.bad_rows.places}
    return TaskData(task, train, splits, skipped, notes)


def _from_files(task: Task, recipe: TaskDataRecipe, path: Path) -> dict[str, Table]:
    wanted = [name for names in (*task.text, task.label) for name in names]

    def read(file: Path, may_be_empty: bool = False) -> Table:
        return read_table(file, task.header, wanted, skip_bad=recipe.bad_rows == "skip", may_be_empty=may_be_empty)

    if path.is_file():
        return {TRAIN: read(path)}
    if not path.is_dir():
        raise BadInput(f"data.path: {path}: no such file or folder")
    tables = {}
    for split in (TRAIN, *task.dev, TEST):
        file = find_table(path, split)
        if file is not None:
            tables[split] = read(file, may_be_empty=split == TEST)
        elif split != TEST:
            kinds = ",".join(suffix[1:] for suffix in SUFFIXES)
            raise BadInput(f"data.path: {path}: there is no {split}.{{{kinds}}} in it")
    return tables


def _from_hub(task: Task, recipe: TaskDataRecipe) -> dict[str, Table]:
    import datasets

    try:
        splits = datasets.load_dataset(HUB, task.name)
    except Exception as error:  # any error of the network, the hub or the cache
        cause = (str(error).strip() or type(error).__name__).split("\n", 1)[0]
        raise BadInput(
            f"{HUB}, {task.name}: cannot be loaded from the hub ({cause}); to read files instead: --data FOLDER"
        ) from error
    tables = {}
    for split, name in {TRAIN: TRAIN, **{split: split.replace("dev", "validation") for split in task.dev}}.items():
        where = f"{HUB}, {task.name}, {name}"
        places = [f"row {row}" for row in range(1, len(splits[name]) + 1)]
        tables[split] = Table(where, splits[name].to_dict(), places, BadRows(where, recipe.bad_rows == "skip"))
    return tables


def _why_left_out(test: Table, task: Task) -> str | None:
    """Why a test split cannot be scored, if it has no labels."""
    if not len(test):
        return "has no rows"
    if not test.has(task.label):
        return "has no labels"
    name, values = test.column(task.label, "data.label")
    if all(is_unlabelled(value) for value in values):
        return f"has no label in any row of its column '{name}'"
    return None


def _split(table: Table, task: Task) -> Split:
    """The good rows of a table. A value that is missing is not an empty text, and only a text is a text."""
    columns = [table.column(names, f"data.text for column {i}") for i, names in enumerate(task.text, 1)]
    label_name, label_values = table.column(task.label, "data.label")
    number_of = LabelNumbers(task)
    texts: Texts = []
    labels: list[float] = []
    for row, place in enumerate(table.places):
        try:
            text = tuple(_text(name, values[row]) for name, values in columns)
            if is_missing(label_values[row]):
                raise ValueError(f"no value in column '{label_name}'")
            label = number_of(label_values[row])
        except ValueError as error:
            table.bad_rows.found(place, str(error))
            continue
        texts.append(text)
        labels.append(label)
    if not texts:
        raise BadInput(table.bad_rows.note())
    return Split(table.where, texts, np.array(labels, dtype=np.float64 if task.regression else np.int64))


def _text(column: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if is_missing(value):
        raise ValueError(f"no value in column '{column}'")
    raise ValueError(f"column '{column}' has {KINDS.get(type(value), f'a {type(value).__name__}')}, not a text")


def _divided(split: Split, held_out: float) -> dict[str, Split]:
    """One file as train and dev."""
    rows = _shuffled(len(split))
    count = max(1, round(held_out * len(rows)))
    if count == len(rows):
        raise BadInput(f"{split.where}: {len(rows)} rows are too few to hold some of them out")
    return {TRAIN: split.take(np.sort(rows[count:])), "dev": split.take(np.sort(rows[:count]))}


def _check_labels(task: Task, train: Split) -> list[str]:
    """Notes on labels that no train row has. Raises BadInput if all train rows have the same label."""
    found = set(train.labels.tolist())
    if len(found) < 2:
        raise BadInput(f"{train.where}: all train rows have the same label; there is nothing to learn")
    missing = [label for number, label in enumerate(task.labels) if number not in found]
    return [f"{train.where}: no train row has the label {', '.join(missing)}"] if missing else []


def _shuffled(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(SHUFFLE_SEED).permutation(count)
