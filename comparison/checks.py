"""What cannot work in a comparison, said before the first row is made: hours later it would be too late."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from comparison.recipe import CompareRecipe
from comparison.rows import AFTER_FINE_TUNING, Row, of_classifier
from compress.dense.to_dense import ToDense
from compress.distil import Distil
from compress.run import check_steps
from compress.step import FormName
from compress.steps import all_steps
from data_prep.shards.reader import open_dataset
from exports.files import CONFIG, TOKENIZER, write_json
from pretrain.distill.recipe import DistillRecipe, plan_distillation
from scoring.data import load_task
from scoring.recipe import BLIMP, PROBE
from scoring.tasks import choose_task
from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import parse


def check_tasks(recipe: CompareRecipe) -> None:
    """Read the rows of all tasks. Raises BadInput for what is wrong with them, or for a task without fine-tuning."""
    for task, data in recipe.tasks.items():
        try:
            if task in (BLIMP, PROBE):
                raise BadInput("takes models as they are, and has no score after fine-tuning")
            if data.path is not None:
                load_task(task, data)
            choose_task(task, data)  # without a path, rows are on the hub
            model = data.augment.model
            inside = model is not None and Path(model).is_relative_to(recipe.folder)  # of a row, which may come later
            if model is not None and not inside and not (Path(model) / CONFIG).is_file():
                raise BadInput(f"data.augment.model: {model}: no model there")
        except BadInput as error:
            raise BadInput(f"tasks.{task}: {error}") from error


def check_models(recipe: CompareRecipe, rows: Sequence[Row]) -> None:
    """Raise BadInput, naming the row, for steps that cannot take the model of the row that they are given, and for a
    teacher that does not fit."""
    models: dict[str, tuple[FormName, ShareBertConfig | None]] = {}
    for row in rows:
        try:
            if row.trial is not None:
                student, teacher = row.trial.recipe, row.asked.teacher
                alone = dataclasses.replace(student, distill=DistillRecipe()) if teacher is not None else student
                models[row.name] = "compact", alone.resolve().model.config
                if teacher is not None:
                    _check_teacher(student.distill, models[row.name][1], teacher, models[teacher][1], recipe.dataset)
                continue
            form, config = models[row.of]
            if row.before is not None:
                form, config = check_steps(all_steps(row.before.steps), row.before, form, config)
            if row.after is not None:
                if recipe.tasks and config is not None:
                    try:
                        if any(isinstance(step, ToDense) for _, step in all_steps(row.after.steps)):
                            raise BadInput("dense: a classifier that was fine-tuned as a ShareBERT has no dense form")
                        headless = dataclasses.replace(config, mlm_head="none")
                        check_steps(all_steps(row.after.steps), of_classifier(row.after), form, headless)
                    except BadInput as error:
                        steps = ", ".join(AFTER_FINE_TUNING)
                        raise BadInput(f"from the first of {steps} on, steps are for classifiers: {error}") from error
                form, config = check_steps(all_steps(row.after.steps), row.after, form, config)
            models[row.name] = form, config
            if row.asked.teacher is not None:
                _check_distil(row, models[row.of][1], models[row.asked.teacher][1], recipe.dataset)
        except BadInput as error:
            raise BadInput(f"rows.{row.name}: {error}") from error


def _check_distil(row: Row, config: ShareBertConfig | None, teacher: ShareBertConfig | None, dataset: str) -> None:
    """Raise BadInput where a step `distil` cannot learn from the row's teacher."""
    assert row.asked.teacher is not None
    for part in (row.before, row.after):
        for _, step in all_steps(part.steps) if part is not None else ():
            if isinstance(step, Distil):
                _check_teacher(parse(DistillRecipe, step.losses, "losses"), config, row.asked.teacher, teacher, dataset)
            config = step.result_config(config) if config is not None else None


def _check_teacher(
    distill: DistillRecipe, student: ShareBertConfig | None, name: str, teacher: ShareBertConfig | None, dataset: str
) -> None:
    """Raise BadInput where a student cannot learn from the row `name`, whose config stands in for the model."""
    if student is None or teacher is None:
        return
    data = open_dataset(dataset)
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / CONFIG, teacher.to_dict())
        shutil.copy(data.tokenizer_path, Path(folder) / TOKENIZER)
        try:
            plan_distillation(dataclasses.replace(distill, teacher=folder), student, data.tokenizer_path, data.seq_len)
        except BadInput as error:
            raise BadInput(str(error).replace(folder, name)) from error
