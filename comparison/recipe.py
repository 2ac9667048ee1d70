"""The recipe of `sharebert compare`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from compress.recipe import ReportRecipe
from scoring.recipe import FineTuneRecipe, Seeds, TaskDataRecipe
from sharebert_common.recipe import STRICT

Keys = dict[str, Any]
"""Dotted keys of another recipe, with values: {"optimizer.lr": 0.003}."""


@dataclass(config=STRICT, kw_only=True)
class RowRecipe:
    """A row of the table: a model that is trained (`train`), or that is made from the model of a row above (`of` and
    `compress`)."""

    train: str | None = None
    """The train recipe of the row: a path, or the name of one that ships with the project."""
    compress: str | None = None
    """The compress recipe that the row is made with: a path, or the name of one that ships with the project."""
    of: str | None = None
    """The row whose model is compressed."""
    teacher: str | None = None
    """The row whose model is the teacher: `distill.teacher` of a train recipe, `teacher` of a compress recipe."""
    keys: Keys = field(default_factory=dict)
    """Keys of the train recipe or of the compress recipe in which the row differs from it."""
    finetune: Keys = field(default_factory=dict)
    """Keys of `finetune` in which the fine-tuning of this row differs from that of the others."""
    task_teacher: str | None = None
    """The row whose classifier of the same task, of the first seed, is the teacher in this row's fine-tuning."""


@dataclass(config=STRICT, kw_only=True)
class PublishedRecipe:
    """A figure that others have published. It stands beside the table, and is not computed."""

    model: str
    """What it is about."""
    figure: str
    """What was published."""
    source: str
    """Where it stands."""


@dataclass(config=STRICT, kw_only=True)
class CompareRecipe:
    """Models that are trained, distilled, compressed and scored one after the other, and a table of all of them."""

    folder: str
    """Where the runs, the models, the scores and the table are."""
    dataset: str
    """Folder of the dataset that all models are trained on. Its validation rows give the masked-LM loss, and the steps
    of compress recipes look at its train rows."""
    rows: Annotated[dict[str, RowRecipe], Field(min_length=1)]
    """The rows by their names, in the order in which they are made; the names are those of folders too."""
    reference: str | None = None
    """The row that parameters and scores are compared with; without it, the first row."""
    common: Keys = field(default_factory=dict)
    """Keys that all train recipes have. A row's own `keys` win over them."""
    validation_rows: PositiveInt = 1024
    """How many validation rows give the masked-LM loss."""
    tasks: dict[str, TaskDataRecipe] = field(default_factory=dict)
    """The rows of each task by the task's name, as `data` of `sharebert evaluate`."""
    finetune: FineTuneRecipe = field(default_factory=FineTuneRecipe)
    """How models are fine-tuned on the tasks. The first seed of a row chooses among several learning rates."""
    seeds: Seeds = field(default_factory=lambda: [1, 2, 3, 4, 5])
    """Seeds of the fine-tunings; each is a piece of its own, which a kill does not undo."""
    report: ReportRecipe = field(default_factory=ReportRecipe)
    """What is timed, and how; `references` are not used."""
    published: list[PublishedRecipe] = field(default_factory=list)
    """Figures of others that stand beside the table."""
    planned: dict[str, Keys] = field(default_factory=dict)
    """Trainings at their real size that are only planned: for each name the keys of a train recipe; the key `base` is
    the recipe that they differ from."""
    planned_gpu: str = "h100"
    """The kind of GPU that they are planned for, as `sharebert plan --gpu` takes it."""
    planned_gpus: PositiveInt = 8
    """The number of GPUs that they are planned for."""
