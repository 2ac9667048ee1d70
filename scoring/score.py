"""`sharebert evaluate`: models one after the other, on the same rows, with the same settings, seeds and metrics."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from scoring.baselines import MAJORITY, TFIDF, Baseline, fit_majority, fit_tfidf
from scoring.blimp.run import evaluate_blimp
from scoring.data import TaskData, load_task
from scoring.distill.augment import augmented
from scoring.distill.teacher import TaskTeacher, label_order, uses_teacher
from scoring.encoders import RANDOM, open_encoder
from scoring.finetune import latency_ms
from scoring.lora import adapt
from scoring.metrics import measure
from scoring.probe.run import evaluate_probe
from scoring.recipe import BLIMP, PROBE, EvaluateRecipe, LoraRecipe
from scoring.report import Result, by_metric, file_name, read_results, table, versions, write_result
from scoring.trial import Trial, encode
from sharebert_common.errors import BadInput
from sharebert_common.files import make_folders

AUGMENTED = "augmented"
"""The folder of further train rows, beside the results of a task."""

BASELINES: dict[str, Callable[[TaskData], Baseline]] = {MAJORITY: fit_majority, TFIDF: fit_tfidf}


def evaluate(
    recipe: EvaluateRecipe, models: Sequence[str], save: Path | None = None, augmented_rows: Path | None = None
) -> str:
    """Score each of `models`, after fine-tuning for all tasks but BLiMP. Results go into `recipe.output`/task.

    Args:
        recipe: task, rows and settings.
        models: folders of encoders, `random:FOLDER`, `majority`, `tfidf`.
        save: a folder for the best fine-tuned classifier, if there is one encoder in `models`.
        augmented_rows: the folder that keeps further train rows; None for one beside the results.

    Returns: the table of all results of the task, with those of earlier calls with the same output.

    Raises BadInput or ShareBertError before the first fit, if something that was given is wrong.
    """
    _refuse_missing_packages()
    if not models:
        raise BadInput("no model was given: an export, the folder of an encoder, random:FOLDER, majority or tfidf")
    if recipe.finetune.lora.rank is None and recipe.finetune.lora != LoraRecipe():
        raise BadInput("finetune.lora.rank: is missing; without it all weights are trained, and other keys do nothing")
    device = _device(recipe.device)
    if recipe.task in (BLIMP, PROBE):
        _check_unchanged(recipe, models, save)
        return (evaluate_blimp if recipe.task == BLIMP else evaluate_probe)(recipe, models, device)
    with_teacher = uses_teacher(recipe.finetune.distill)
    data = load_task(recipe.task, recipe.data)
    if with_teacher:
        label_order(Path(str(recipe.finetune.distill.teacher)), data.task)
    encoders = {spec: open_encoder(spec, recipe.finetune) for spec in models if spec not in BASELINES}
    if save is not None:
        _check_save(save, list(encoders))
    folder = Path(recipe.output) / file_name(data.task.name)
    if recipe.data.augment.model is not None:
        kept = augmented_rows or folder / AUGMENTED
        data = augmented(data, recipe.data.augment, device, kept, recipe.finetune.max_length)
    for note in data.notes:
        print(note, file=sys.stderr)
    rows = {spec: encode(encoder, data) for spec, encoder in encoders.items()}
    for encoder in encoders.values():
        model = encoder.build(data.task, 0)  # finds a damaged model before an hour is spent on another one
        if recipe.finetune.lora.rank is not None:
            adapt(encoder, model, recipe.finetune)
    teacher = None
    if with_teacher and encoders:
        teacher = TaskTeacher(recipe.finetune, data, device)
        for spec, encoder in encoders.items():
            teacher.check(encoder, rows[spec]["train"])
    make_folders(folder)
    read_results(folder)  # refuses a folder with other files now, not after the first model
    for spec in models:
        if spec in BASELINES:
            result = score_baseline(spec, data)
        else:
            trial = Trial(recipe, data, encoders[spec], rows[spec], device, folder, teacher)
            result, best = trial.run()
            if save is not None:
                encoders[spec].save(best.cpu(), data.task, table([result]), save)
        write_result(folder, result)
    return table(read_results(folder))


def score_baseline(name: str, data: TaskData) -> Result:
    """Fit and score a baseline. It has no random numbers, so one fit is enough."""
    start = time.perf_counter()
    fitted = BASELINES[name](data)
    fit_s = time.perf_counter() - start
    scores = {
        split: measure(data.task.metrics, fitted.predict(rows.texts), rows.labels)
        for split, rows in data.held_out.items()
    }
    return Result(
        task=data.task.name,
        model=name,
        scores=by_metric([scores]),
        parameters=fitted.parameters,
        bytes=fitted.nbytes,
        latency_ms=latency_ms(fitted.predict, data.held_out[data.dev[0]].texts),
        device="cpu",
        threads=1,
        train_rows=len(data.train),
        fit_s=[fit_s],
        versions=versions(),
        skipped_rows=data.skipped,
    )


def _check_unchanged(recipe: EvaluateRecipe, models: Sequence[str], save: Path | None) -> None:
    task, default = recipe.task, EvaluateRecipe(task=recipe.task)
    if save is not None:
        raise BadInput(f"--save: {task} fine-tunes nothing that could be kept")
    for key in ("finetune", "seeds"):
        if getattr(recipe, key) != getattr(default, key):
            raise BadInput(f"{key}: {task} takes a model as it is, without fine-tuning; leave {key} out")
    for spec in models:
        if task == PROBE and spec in BASELINES:
            raise BadInput(f"{spec}: probe takes encoders; the majority is in every table")
        if task == BLIMP and (spec in BASELINES or spec.startswith(RANDOM)):
            raise BadInput(
                f"{spec}: blimp scores masked language models as they are: give exports or folders of models"
            )


def _check_save(save: Path, encoders: Sequence[str]) -> None:
    if len(encoders) != 1:
        raise BadInput(f"--save: needs exactly one encoder, and {len(encoders)} were given")
    if save.exists() and not (save.is_dir() and not any(save.iterdir())):
        raise BadInput(f"--save: {save}: exists; choose another folder, or remove it first")


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadInput("device: there is no CUDA device on this machine; use device=cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _refuse_missing_packages() -> None:
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise BadInput(f"evaluate needs {error.name}: pip install 'sharebert[evaluate]'") from error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
