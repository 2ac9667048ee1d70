"""Labels as numbers."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any

from scoring.tables import as_text, is_missing
from scoring.tasks import TASKS, Task

UNLABELLED = {"", "-1", "?", "-", "null", "none", "nan", "na", "n/a"}
"""What stands for a label in test files without labels, in small letters."""


class LabelNumbers:
    """The number of each label of a task."""

    def __init__(self, task: Task) -> None:
        self._task = task
        numbers = {str(number): number for number in range(len(task.labels))} if task.name in TASKS else {}
        self._numbers = numbers | {label: number for number, label in enumerate(task.labels)}

    def __call__(self, value: Any) -> float:
        """A label from a file as its number from 0, or as a value for regression.

        Raises ValueError with what is wrong: it is not a label of the task, or not a number.
        """
        if isinstance(value, (list, dict)):
            raise ValueError(
                f"the label is {'a list' if isinstance(value, list) else 'an object'}, not one word or number"
            )
        text = as_text(value)
        if self._task.regression:
            number = _number(text)
            if not isfinite(number):
                raise ValueError(f"label '{text}' is not a number")
            return number
        if text not in self._numbers:
            known = ", ".join(self._task.labels)
            if self._task.name in TASKS:
                raise ValueError(f"label '{text}' is not one of {known}, nor of 0 to {len(self._task.labels) - 1}")
            raise ValueError(f"label '{text}' is not one of {known}; data.labels=[…] lists all labels")
        return self._numbers[text]


def labels_of(values: Iterable[Any]) -> tuple[str, ...]:
    """The labels that occur: numbers in numerical order, words in alphabetical order. An empty field is no label."""
    found = {as_text(value) for value in values if not is_missing(value) and not isinstance(value, (list, dict))} - {""}
    if all(isfinite(_number(label)) for label in found):
        return tuple(sorted(found, key=float))
    return tuple(sorted(found))


def is_unlabelled(value: Any) -> bool:
    """Whether a value stands for "no label": GLUE's own test files have -1, other files leave it empty."""
    return is_missing(value) or as_text(value).strip().lower() in UNLABELLED


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
