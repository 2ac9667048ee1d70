"""`sharebert evaluate --task probe`: models one after the other, on the same words."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scoring.encoders import Encoder, open_encoder
from scoring.finetune import latency_ms
from scoring.probe.regression import predict
from scoring.probe.vectors import word_vectors
from scoring.probe.words import NO_LABEL, PROPERTIES, Row, Rows, read_rows
from scoring.recipe import PROBE, EvaluateRecipe, TaskDataRecipe
from scoring.report import Result, details_table, file_name, read_results, table, versions, write_result
from scoring.tasks import Task
from sharebert_common.errors import BadInput
from sharebert_common.files import make_folders

SEED = 0
"""Of the weights of a `random:` model."""

MAJORITY, MIX = "majority", "mix"
"""Rows of a table beside the layers: the most frequent label of train, and the learned mix of all layers."""

_TASK = Task(PROBE, text=(("text",),), labels=("no", "yes"))


def evaluate_probe(recipe: EvaluateRecipe, models: Sequence[str], device: torch.device) -> str:
    """Probe each of `models`, and write the results into a folder of the task in `recipe.output`.

    Returns: the table of all results, and accuracy and F1 of each layer.

    Raises BadInput or ShareBertError before the first model, if something that was given is wrong.
    """
    data = recipe.data
    usable = TaskDataRecipe(
        path=data.path, text=data.text, header=data.header, bad_rows=data.bad_rows, held_out=data.held_out
    )
    if data != usable:
        raise BadInput("data: probe takes data.path, text, header, bad_rows and held_out alone")
    rows = read_rows(data, recipe.probe)
    encoders = {spec: open_encoder(spec, recipe.finetune) for spec in models}
    folder = Path(recipe.output) / file_name(PROBE)
    make_folders(folder)
    read_results(folder)
    for encoder in encoders.values():
        write_result(folder, _probe(encoder, rows, recipe, device))
    results = read_results(folder)
    return f"{table(results)}\n\n{details_table(results, list(dict.fromkeys(k for r in results for k in r.details)))}"


def _probe(encoder: Encoder, rows: Rows, recipe: EvaluateRecipe, device: torch.device) -> Result:
    started = time.perf_counter()
    model = encoder.build(_TASK, SEED).eval().to(device)
    train, dev = (word_vectors(encoder, model, part, device) for part in rows)
    found: dict[str, dict[str, float]] = {}
    for name in PROPERTIES:
        for which, (accuracy, f1) in _scores(name, rows, train, dev).items():
            found.setdefault(f"{name}, accuracy", {})[which] = accuracy
            found.setdefault(f"{name}, F1", {})[which] = f1
        _say(
            f"probe  {encoder.spec}  {name}  F1 {found[f'{name}, F1'][MIX]:.4f}  {time.perf_counter() - started:.0f} s"
        )
    own = set(encoder.new_parameters(model))
    parameters = [parameter for name, parameter in model.named_parameters() if name not in own]
    return Result(
        task=PROBE,
        model=encoder.spec,
        scores={"dev": {f"{name} F1": [found[f"{name}, F1"][MIX]] for name in PROPERTIES}},
        details=found,
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.nbytes for parameter in parameters),
        latency_ms=latency_ms(lambda texts: word_vectors(encoder, model, texts, device), rows.dev),  # type: ignore[arg-type]
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        train_rows=len(rows.train),
        fit_s=[time.perf_counter() - started],
        settings={"rows": len(rows.train) + len(rows.dev), "words": recipe.probe.words},
        versions=versions(),
    )


def _scores(name: str, rows: Rows, train: Tensor, dev: Tensor) -> dict[str, tuple[float, float]]:
    """Layer → accuracy and macro F1 on the dev words that have a label, without labels that none of them has."""
    from sklearn.metrics import accuracy_score, f1_score

    classes = len(PROPERTIES[name])
    ours, theirs = (_labels(name, part) for part in rows)
    kept, kept_dev = ours != NO_LABEL, theirs != NO_LABEL
    ours, theirs, train, dev = ours[kept], theirs[kept_dev], train[:, kept], dev[:, kept_dev]
    guesses = {MAJORITY: ours.bincount().argmax().expand(len(theirs))}
    for layer in range(len(train)):
        guesses[f"layer {layer:02d}"] = predict(train[layer : layer + 1], ours, classes, dev[layer : layer + 1])
    guesses[MIX] = predict(train, ours, classes, dev)
    return {
        which: (
            float(accuracy_score(theirs, guess)),
            float(f1_score(theirs, guess, labels=theirs.unique(), average="macro", zero_division=0)),
        )
        for which, guess in guesses.items()
    }


def _labels(name: str, rows: Sequence[Row]) -> Tensor:
    return torch.tensor([label for row in rows for label in row.labels[name]])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
