"""One fine-tuning of an encoder, as ShareBERT's authors do it, with a teacher or without.

A batch holds rows of similar length, so that short texts cost little: rows are shuffled, sorted by length inside
windows of many batches, and the batches are shuffled again. The optimizer is AdamW; the learning rate rises linearly
and falls by a polynomial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import nn

from scoring.classifier import Classifier
from scoring.data import TaskData, Texts
from scoring.distill.lesson import Lesson
from scoring.distill.teacher import TaskTeacher
from scoring.encoders import Encoded, Encoder
from scoring.lora import adapt
from scoring.recipe import FineTuneRecipe
from sharebert_common.errors import BadInput
from sharebert_common.progress import progress

WINDOW = 50
"""Rows are sorted by length inside windows of this many batches."""

Watch = Callable[[int, dict[str, float]], None]
"""Called after each step with its number and its values: `loss` and `lr`."""


class Diverged(BadInput):
    """The loss is not finite: the learning rate is too high for this model."""


def fine_tune(
    encoder: Encoder,
    data: TaskData,
    train: Encoded,
    *,
    lr: float,
    seed: int,
    settings: FineTuneRecipe,
    device: torch.device,
    watch: Watch,
    at_epoch: Callable[[int, int, Classifier], None],
    teacher: TaskTeacher | None = None,
) -> Classifier:
    """Fine-tune on the rows of `train`, the tokenised `data.train`.

    Args:
        encoder: the encoder to start from.
        data: the task.
        train: the train rows.
        lr: the highest learning rate of the schedule.
        seed: decides the start of the classifier, the order of rows, and dropout.
        settings: all other settings.
        device: the device to train on.
        watch: called after each step with its loss and learning rate.
        at_epoch: called after each epoch with its number (from 1), the step, and the classifier so far.
        teacher: of `settings.distill`, opened for the same rows.

    Raises Diverged: the loss is not finite.
    """
    from transformers import get_polynomial_decay_schedule_with_warmup

    model = encoder.build(data.task, seed)
    adapted = None if settings.lora.rank is None else adapt(encoder, model, settings)
    model = model.to(device)
    trained_numbers = None if adapted is None else adapted.trained
    classifier = Classifier(encoder, model, device, data.task.regression, trained_numbers)
    lesson = None if teacher is None else Lesson(teacher, encoder, model).to(device)
    trained = nn.ModuleList([model] if lesson is None else [model, lesson])
    arguments = {} if lesson is None else lesson.arguments
    order = np.random.default_rng(seed)
    torch.manual_seed(seed)
    labels = torch.tensor(data.train.labels, dtype=torch.float32 if data.task.regression else torch.int64)
    steps = settings.epochs * ceil(len(train) / settings.batch)
    optimizer = torch.optim.AdamW(_groups(trained, settings.weight_decay), lr=lr)
    schedule = get_polynomial_decay_schedule_with_warmup(
        optimizer, min(settings.warmup_steps, steps // 2), steps, lr_end=0.0, power=settings.power
    )
    step = 0
    for epoch in range(1, settings.epochs + 1):
        model.train()
        batches = batches_by_length(train.lengths(), settings.batch, order)
        what = f"{encoder.spec}, seed {seed}, epoch {epoch}/{settings.epochs}"
        for rows in progress(batches, what, ceil(len(train) / settings.batch)):
            step += 1
            batch = {name: values.to(device) for name, values in encoder.collate(train, rows).items()}
            with _precision(device, settings.precision):
                output = model(**batch, labels=labels[rows].to(device), **arguments)
                loss = output.loss if lesson is None else lesson(output, batch, rows)
            value = float(loss.detach())
            if not np.isfinite(value):
                raise Diverged(f"{encoder.spec}, seed {seed}: the loss is {value} at step {step}; lower lr ({lr:g})")
            loss.backward()
            if settings.clip:
                nn.utils.clip_grad_norm_(trained.parameters(), settings.clip)
            watch(step, {"loss": value, "lr": schedule.get_last_lr()[0]})
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if adapted is not None and epoch == settings.epochs:
            classifier = dataclasses.replace(classifier, model=adapted.merged())
        at_epoch(epoch, step, classifier)
    classifier.model.eval()
    return classifier


def batches_by_length(lengths: list[int], batch: int, order: np.random.Generator) -> Iterator[list[int]]:
    """All rows once, in batches of similar length and random order; the last batch of a window may be smaller."""
    rows = order.permutation(len(lengths))
    sizes = np.asarray(lengths)
    found = []
    for start in range(0, len(rows), WINDOW * batch):
        window = rows[start : start + WINDOW * batch]
        window = window[np.argsort(sizes[window], kind="stable")]
        found += [window[first : first + batch].tolist() for first in range(0, len(window), batch)]
    for number in order.permutation(len(found)):
        yield found[number]


def latency_ms(predict: Callable[[Texts], Any], texts: Texts, calls: int = 30) -> float:
    """The median time of a prediction for one text, with tokenisation; each call takes the next of `texts`."""
    times = []
    for number in range(calls + 5):
        start = time.perf_counter()
        predict([texts[number % len(texts)]])
        times.append(time.perf_counter() - start)
    return float(np.median(times[5:])) * 1e3  # the first calls warm up


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed; biases and norms, which are vectors, are not."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _precision(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
