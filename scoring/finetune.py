"""Fine-tuning of an encoder, as ShareBERT's authors do it, and its predictions.

Rows of like length go together, so that short texts cost little: rows are shuffled, sorted by length inside
windows of many batches, and the batches shuffled again. AdamW; the rate rises linearly and falls by a polynomial.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from scoring.data import TaskData, Texts
from scoring.encoders import Encoded, Encoder
from scoring.recipe import FineTuneConfig
from sharebert_common.errors import BadInput

WINDOW = 50  # batches among which rows are sorted by length
PREDICT_BATCH = 128

Watch = Callable[[int, dict[str, float]], None]
"""Is given a step and what is known after it: `loss`, `lr`, and at the end of an epoch `epoch`."""


class Diverged(BadInput):
    """The loss is not finite: the learning rate is too high for the model."""


@dataclass(frozen=True)
class Classifier:
    """A fine-tuned encoder."""

    encoder: Encoder
    model: nn.Module
    device: torch.device
    regression: bool

    @property
    def parameters(self) -> int:
        """Learned numbers."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def nbytes(self) -> int:
        """Of its parameters, as they are held."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def cpu(self) -> nn.Module:
        """Its model, on the CPU."""
        return self.model.to("cpu")

    def predict(self, texts: Texts) -> NDArray[Any]:
        """[N] numbers of labels, or values for regression."""
        return self.predict_encoded(self.encoder.encode(texts, "text"))

    def predict_encoded(self, encoded: Encoded) -> NDArray[Any]:
        """As `predict`, of rows that are tokenised already."""
        order = np.argsort(encoded.lengths(), kind="stable")
        self.model.eval()
        parts = []
        with torch.inference_mode():
            for start in range(0, len(order), PREDICT_BATCH):
                batch = self.encoder.collate(encoded, order[start : start + PREDICT_BATCH].tolist())
                logits = self.model(**{name: values.to(self.device) for name, values in batch.items()}).logits
                parts.append(logits.float().cpu().numpy())
        logits = np.concatenate(parts)
        values = logits[:, 0].astype(np.float64) if self.regression else logits.argmax(1)
        predicted = np.empty_like(values)
        predicted[order] = values
        return predicted


def fine_tune(
    encoder: Encoder,
    data: TaskData,
    train: Encoded,
    *,
    lr: float,
    seed: int,
    settings: FineTuneConfig,
    device: torch.device,
    watch: Watch,
    at_epoch: Callable[[int, int, Classifier], None],
) -> Classifier:
    """Fine-tune on the rows of `train`, the tokenised `data.train`.

    Args:
        encoder: what to start from.
        data: the task.
        train: its train rows.
        lr: the largest learning rate.
        seed: of the classifier's first weights, the order of rows and dropout.
        settings: the rest.
        device: where to.
        watch: told of each step's loss and learning rate.
        at_epoch: called after each epoch, from 1, with the step and the classifier as it is.

    Raises Diverged: the loss is not finite.
    """
    from transformers import get_polynomial_decay_schedule_with_warmup

    model = encoder.build(data.task, seed).to(device)
    classifier = Classifier(encoder, model, device, data.task.regression)
    order = np.random.default_rng(seed)
    torch.manual_seed(seed)
    labels = torch.tensor(data.train.labels, dtype=torch.float32 if data.task.regression else torch.int64)
    steps = settings.epochs * ceil(len(train) / settings.batch)
    optimizer = torch.optim.AdamW(_groups(model, settings.weight_decay), lr=lr)
    schedule = get_polynomial_decay_schedule_with_warmup(
        optimizer, min(settings.warmup_steps, steps // 2), steps, lr_end=0.0, power=settings.power
    )
    step = 0
    for epoch in range(1, settings.epochs + 1):
        model.train()
        for rows in batches_by_length(train.lengths(), settings.batch, order):
            step += 1
            batch = {name: values.to(device) for name, values in encoder.collate(train, rows).items()}
            with _precision(device, settings.precision):
                loss = model(**batch, labels=labels[rows].to(device)).loss
            value = float(loss.detach())
            if not np.isfinite(value):
                raise Diverged(f"{encoder.spec}, seed {seed}: the loss is {value} at step {step}; lower lr ({lr:g})")
            loss.backward()
            if settings.clip:
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            watch(step, {"loss": value, "lr": schedule.get_last_lr()[0]})
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        at_epoch(epoch, step, classifier)
    model.eval()
    return classifier


def batches_by_length(lengths: list[int], batch: int, order: np.random.Generator) -> Iterator[list[int]]:
    """All rows once, in batches of rows of like length, in random order; the last of a window may be smaller."""
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
    """Median milliseconds of a prediction for one text, tokenisation included; `texts` are gone through in turn."""
    times = []
    for number in range(calls + 5):
        start = time.perf_counter()
        predict([texts[number % len(texts)]])
        times.append(time.perf_counter() - start)
    return float(np.median(times[5:])) * 1e3  # the first ones warm up


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and norms, which are vectors, are not decayed."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _precision(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
