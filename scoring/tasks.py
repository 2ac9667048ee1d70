"""The nine tasks of GLUE (Wang et al., ICLR 2019), and tasks that a recipe describes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from scoring.recipe import TaskDataRecipe
from sharebert_common.errors import BadInput, nearest

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """A task: its columns, labels in the hub's order, and metrics."""

    name: str
    text: tuple[tuple[str, ...], ...]
    """For one text, or for each text of a pair: the names that its column may have."""
    label: tuple[str, ...] = ("label",)
    """The names that the column of the label may have."""
    labels: tuple[str, ...] = ()
    """The labels as words; files may also hold their numbers from 0. Empty for regression, or until train is read."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Names of functions in `scoring.metrics`; a sweep compares the mean of them."""
    regression: bool = False
    header: tuple[str, ...] = ()
    """All columns of its files, if they have no header line."""
    dev: tuple[str, ...] = ("dev",)
    """Its dev splits, named as its files are; on the hub, `validation` stands for `dev`."""


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = (("sentence1",), ("sentence2",))

TASKS = {
    task.name: task
    for task in (
        Task(
            "cola",
            text=(("sentence",),),
            labels=("unacceptable", "acceptable"),
            metrics=("matthews",),
            header=("source", "label", "mark", "sentence"),
        ),
        Task("sst2", text=(("sentence",),), labels=("negative", "positive")),
        Task(
            "mrpc",
            text=(("sentence1", "#1 String"), ("sentence2", "#2 String")),
            label=("label", "Quality"),
            labels=("not_equivalent", "equivalent"),
            metrics=("f1", "accuracy"),
        ),
        Task("stsb", text=_PAIR, label=("label", "score"), metrics=("pearson", "spearman"), regression=True),
        Task(
            "qqp",
            text=(("question1",), ("question2",)),
            label=("label", "is_duplicate"),
            labels=("not_duplicate", "duplicate"),
            metrics=("f1", "accuracy"),
        ),
        Task(
            "mnli",
            text=(("premise", "sentence1"), ("hypothesis", "sentence2")),
            label=("label", "gold_label"),
            labels=("entailment", "neutral", "contradiction"),
            dev=("dev_matched", "dev_mismatched"),
        ),
        Task("qnli", text=(("question",), ("sentence",)), labels=_ENTAILMENT),
        Task("rte", text=_PAIR, labels=_ENTAILMENT),
        Task("wnli", text=_PAIR, labels=("not_entailment", "entailment")),
    )
}


def choose_task(name: str, recipe: TaskDataRecipe) -> Task:
    """A task of GLUE with the columns of the recipe, or a task that the recipe describes alone.

    Raises BadInput: the task is none of GLUE's and the recipe does not name its columns, or the two contradict.
    """
    task = TASKS.get(name)
    if task is None:
        task = _own_task(name, recipe)
    elif recipe.regression and not task.regression:
        raise BadInput(f"data.regression: {name} has labels; give a task of your own another name")
    if recipe.text:
        if task.text and len(task.text) != len(recipe.text):
            raise BadInput(f"data.text: {name} takes {len(task.text)} columns (got {len(recipe.text)})")
        task = dataclasses.replace(task, text=tuple((column,) for column in recipe.text))
    if recipe.label:
        task = dataclasses.replace(task, label=(recipe.label,))
    if recipe.header:
        task = dataclasses.replace(task, header=tuple(recipe.header))
    if recipe.labels:
        twice = next((label for label in recipe.labels if recipe.labels.count(label) > 1), None)
        if twice is not None:
            raise BadInput(f"data.labels: '{twice}' is listed twice; list each label once")
        if task.labels and len(task.labels) != len(recipe.labels):
            raise BadInput(f"data.labels: {name} has {len(task.labels)} labels (got {len(recipe.labels)})")
        task = dataclasses.replace(task, labels=tuple(recipe.labels))
    return task


def _own_task(name: str, recipe: TaskDataRecipe) -> Task:
    if not recipe.text:
        known = ", ".join(sorted(TASKS))
        raise BadInput(
            f"task: no task '{name}'{nearest(name, TASKS)} (tasks: {known}; for a task of your own give "
            "data.path=… data.text=… data.label=…)"
        )
    if recipe.path is None:
        raise BadInput(f"task: '{name}' is your own task, so data.path must say where its rows are")
    metrics = ("pearson", "spearman") if recipe.regression else ("accuracy",)
    return Task(name, text=(), metrics=metrics, regression=recipe.regression)
