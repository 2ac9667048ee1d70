"""The rows of a comparison, checked before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.recipe import CompareRecipe, Keys, RowRecipe
from compress.recipe import CompressRecipe, ReportRecipe, RowsRecipe
from compress.steps import all_steps
from data_prep.shards.reader import open_dataset
from pretrain.sweep.recipe import NOT_VARIED, SweepRecipe, Trial, refuse_set_keys, trials
from scoring.recipe import EvaluateRecipe
from sharebert_common.errors import BadInput, nearest
from sharebert_common.recipe import load, plain

AFTER_FINE_TUNING = ("trim", "quantise", "prune_weights", "dense", "awq", "onnx", "onnx_int8")
"""Steps whose result cannot be fine-tuned, or would lose by it what they gained: from the first of them on, the steps
of a recipe are applied to the fine-tuned classifiers."""

UNTIMED = ReportRecipe(latency=[])
"""Of each piece: all models are timed together, see `times`."""

BEFORE = ".before"
"""Ends the name of a row's model before those steps."""


@dataclass(frozen=True)
class Row:
    """A row that was checked."""

    name: str
    asked: RowRecipe
    trial: Trial | None = None
    """The training; None for a row that is compressed."""
    before: CompressRecipe | None = None
    """The steps before fine-tuning; None where there are none."""
    after: CompressRecipe | None = None
    """The steps after fine-tuning, likewise."""

    @property
    def tuned(self) -> str:
        """Whose classifiers of fine-tuning the row has: its own, or those of the row that it is made of."""
        if self.after is None:
            return self.name
        return f"{self.name}{BEFORE}" if self.before or self.asked.finetune or self.asked.task_teacher else self.of

    @property
    def tunes(self) -> bool:
        """Whether it is fine-tuned itself, in place of using the classifiers of the row that it is made of."""
        return self.tuned in (self.name, f"{self.name}{BEFORE}")

    @property
    def of(self) -> str:
        """The row that it is made of."""
        assert self.asked.of is not None
        return self.asked.of


@dataclass(frozen=True)
class Places:
    """Where the pieces of a comparison lie."""

    folder: Path

    def model(self, name: str, trained: bool) -> Path:
        """The model of a row: the export of its run, or the result of its steps."""
        return self.folder / ("exports" if trained else "compressed") / name

    def classifiers(self, name: str, task: str) -> Path:
        """The folder of the classifiers of a row for a task, one a seed."""
        return self.folder / "classifiers" / name / task

    @staticmethod
    def of_seed(seed: int) -> str:
        """The name of one of them."""
        return f"seed-{seed}"


def checked(recipe: CompareRecipe) -> list[Row]:
    """All rows in order.

    Raises BadInput, naming the row and its key: an unknown key, a row that is not above, a step that does not exist.
    """
    open_dataset(recipe.dataset)
    _check_names(recipe)
    places = Places(Path(recipe.folder))
    trained = _trials(recipe, places)
    rows = []
    for name, asked in recipe.rows.items():
        if name in trained:
            rows.append(Row(name, asked, trial=trained[name]))
        else:
            rows.append(Row(name, asked, None, *_steps(name, asked, recipe, places)))
    by_name = {row.name: row for row in rows}
    for row in rows:
        for key in ("of", "teacher", "task_teacher"):
            other = getattr(row.asked, key)
            if other is not None and by_name[other].after is not None:
                steps = ", ".join(AFTER_FINE_TUNING)
                raise BadInput(f"rows.{row.name}.{key}: name a row without the steps {steps}; '{other}' has one")
        for task in recipe.tasks:
            evaluation(recipe, row, task)
    return rows


def of_classifier(steps: CompressRecipe) -> CompressRecipe:
    """Steps for a classifier, which has no masked-LM loss."""
    return dataclasses.replace(steps, validation=RowsRecipe())


def saved(rows: list[Row]) -> set[str]:
    """Whose classifiers are kept, because a later row is made from them or learns from them."""
    return {row.tuned for row in rows if row.after is not None} | {
        row.asked.task_teacher for row in rows if row.asked.task_teacher is not None
    }


def evaluation(recipe: CompareRecipe, row: Row, task: str) -> EvaluateRecipe:
    """The fine-tuning of a row with the first seed, which chooses the learning rate."""
    keys: Keys = dict(row.asked.finetune)
    if row.asked.task_teacher is not None:
        place = Places(Path(recipe.folder)).classifiers(row.asked.task_teacher, task)
        keys["distill.teacher"] = str(place / Places.of_seed(recipe.seeds[0]))
    first = recipe.seeds[:1]
    given = {"task": task, "data": plain(recipe.tasks[task]), "finetune": plain(recipe.finetune), "seeds": first}
    try:
        return load(EvaluateRecipe, None, _overrides({f"finetune.{key}": v for key, v in keys.items()}), defaults=given)
    except BadInput as error:
        raise BadInput(f"rows.{row.name}.finetune: {error}") from error


def _check_names(recipe: CompareRecipe) -> None:
    above: list[str] = []
    for name, row in recipe.rows.items():
        where = f"rows.{name}"
        if not re.fullmatch(r"\w[\w+-]*", name):
            raise BadInput(f"{where}: a name has letters, digits, '_', '+' and '-' alone, because a folder has it too")
        if (row.train is None) == (row.compress is None):
            raise BadInput(f"{where}: give either train, or compress and of")
        if (row.compress is None) != (row.of is None):
            raise BadInput(f"{where}.of: goes together with compress, and names the row whose model is compressed")
        for key in ("of", "teacher", "task_teacher"):
            other = getattr(row, key)
            if other is not None and other not in above:
                raise BadInput(f"{where}.{key}: no row '{other}' above this one{nearest(other, above)}")
        above.append(name)
    if recipe.reference is not None and recipe.reference not in above:
        raise BadInput(f"reference: no row '{recipe.reference}'{nearest(recipe.reference, above)}")


def _trials(recipe: CompareRecipe, places: Places) -> dict[str, Trial]:
    """The trainings, as those of a sweep with one seed."""
    arms: dict[str, Keys] = {}
    given = {
        "common": recipe.common,
        **{f"rows.{name}.keys": row.keys for name, row in recipe.rows.items() if row.train},
    }
    refuse_set_keys(given, dict.fromkeys(NOT_VARIED, "is set by the comparison for each training"))
    for name, row in recipe.rows.items():
        if row.train is not None:
            arms[name] = {"base": row.train, **row.keys}
            if row.teacher is not None:
                arms[name]["distill.teacher"] = str(_model_of(row.teacher, recipe, places))
    if not arms:
        raise BadInput("rows: no row is trained; give one of them `train`")
    base = str(next(iter(arms.values()))["base"])
    common = {"data.dataset": recipe.dataset, **recipe.common}
    sweep = SweepRecipe(folder=recipe.folder, base=base, common=common, arms=arms)
    found = {trial.row: trial for trial in trials(sweep)}
    for name, trial in found.items():
        try:
            trial.recipe.check_engine()
        except BadInput as error:
            raise BadInput(f"rows.{name}: {error}") from error
    return found


def _steps(
    name: str, row: RowRecipe, recipe: CompareRecipe, places: Places
) -> tuple[CompressRecipe | None, CompressRecipe | None]:
    """The steps of a compress recipe before fine-tuning, and those after it."""
    for key in row.keys:
        if key.split(".")[0] in ("report", "validation", "task", "teacher"):
            raise BadInput(f"rows.{name}.keys: {key} is the same for all rows, and no key of one; leave it out")
    keys: Keys = {"calibration.dataset": recipe.dataset, **row.keys}
    if row.teacher is not None:
        keys["teacher"] = str(_model_of(row.teacher, recipe, places))
    try:
        asked = load(CompressRecipe, row.compress, _overrides(keys))
        names = [step for step, _ in all_steps(asked.steps)]
    except BadInput as error:
        raise BadInput(f"rows.{name}: {error}") from error
    if asked.teacher is None and "distil" in names:
        raise BadInput(f"rows.{name}.teacher: the step distil learns from a teacher; name a row above")
    cut = next((number for number, step in enumerate(names) if step in AFTER_FINE_TUNING), len(names))
    validation = RowsRecipe(dataset=recipe.dataset, rows=recipe.validation_rows)
    whole = dataclasses.replace(asked, validation=validation, report=UNTIMED)
    before, after = asked.steps[:cut], asked.steps[cut:]
    return (
        dataclasses.replace(whole, steps=before) if before else None,
        dataclasses.replace(whole, steps=after) if after else None,
    )


def _model_of(name: str, recipe: CompareRecipe, places: Places) -> Path:
    return places.model(name, recipe.rows[name].train is not None)


def _overrides(keys: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in keys.items()]
