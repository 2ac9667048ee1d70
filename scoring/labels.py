"""Labels as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scoring.tables import Table
from scoring.tasks import TASKS, Task
from sharebert_common.errors import BadInput


def label_numbers(table: Table, labels: Sequence[str], task: Task) -> NDArray[Any]:
    """The labels of all rows of `table` [N]: int64 numbers from 0, or float64 for regression.

    Raises BadInput, naming the row: a label that the task does not have, or no number where one is needed.
    """
    if task.regression:
        values = np.array([_number(label) for label in labels])
        if len(bad := (~np.isfinite(values)).nonzero()[0]):
            raise BadInput(f"{table.place(int(bad[0]))}: label '{labels[bad[0]]}' is not a number")
        return values
    known = {str(number): number for number in range(len(task.labels))} if task.name in TASKS else {}
    known |= {label: number for number, label in enumerate(task.labels)}
    for row, label in enumerate(labels):
        if label not in known:
            raise BadInput(
                f"{table.place(row)}: label '{label}' is not one of {', '.join(task.labels)}"
                + (f", nor of 0 to {len(task.labels) - 1}" if task.name in TASKS else "")
            )
    return np.array([known[label] for label in labels], dtype=np.int64)


def has_labels(test: Table, task: Task) -> bool:
    """Whether a test split can be scored. GLUE's own test files have no labels, or -1 in every row."""
    return test.has(task.label) and set(test.column(task.label, "data.label")) != {"-1"}


def labels_of(labels: Sequence[str]) -> tuple[str, ...]:
    """The labels that occur: numbers in numerical order, words in alphabetical order."""
    found = set(labels)
    if all(isfinite(_number(label)) for label in found):
        return tuple(sorted(found, key=float))
    return tuple(sorted(found))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
