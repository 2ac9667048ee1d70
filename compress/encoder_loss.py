"""Calibration rows of an encoder of Hugging Face or of a dense export, what gradients are taken of, and what steps
train it on: the model itself as teacher, and its task where it has a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calibrate import Batch, batches, hidden_error, losses_of, random_product, random_scores
from compress.source import pad_id


def rows_of(tokens: Tensor, folder: Path, head: str, seed: int, rows_at_once: int = 32) -> list[Batch]:
    """Calibration rows [rows, length] in batches: with words masked for a masked language model, else as they are.

    Raises BadInput: words are to be masked, and the tokenizer lacks a special token.
    """
    if head == "MaskedLM":
        return batches(tokens, folder / "tokenizer.json", seed, rows_at_once)
    pad = pad_id(folder)
    return [Batch(part, (part != pad).long(), torch.full_like(part, -100)) for part in tokens.split(rows_at_once)]


def outputs(model: nn.Module, batch: Batch) -> Any:
    """What the model returns, with the hidden states of each layer."""
    return model(input_ids=batch.tokens, attention_mask=batch.visible, output_hidden_states=True)


def encoder_objective(model: Any, batch: Batch, head: str, generator: torch.Generator) -> Tensor:
    """The sum over rows of what gradients are taken of: of a masked language model its loss at the masked words, of a
    classifier `calibrate.random_scores`, and of an encoder alone the product of the hidden states with random numbers;
    see `calibrate.objective`."""
    if head == "MaskedLM":
        return losses_of(outputs(model, batch).logits[batch.labels >= 0], batch)
    if head == "SequenceClassification":
        return random_scores(outputs(model, batch).logits, generator)
    return random_product(outputs(model.base_model, batch).last_hidden_state, batch, generator)


def encoder_loss(student: Any, teacher: Any, batch: Batch, head: str, task_weight: float) -> Tensor:
    """task_weight · task + (1 - task_weight) · features, a mean over rows.

    features: the squared error of the hidden states after each layer, over their mean square, without padding. task:
    of a masked language model its loss at the masked words; of a classifier the Kullback-Leibler divergence of its
    labels from the teacher's, or their squared error where it has one output. Without a head `task_weight` is 0.
    """
    ours = outputs(student if task_weight > 0 else student.base_model, batch)
    with torch.no_grad():
        theirs = outputs(teacher if head == "SequenceClassification" else teacher.base_model, batch)
    features = torch.zeros(())
    if task_weight < 1:
        pairs = zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
        features = torch.stack([hidden_error(x, y, batch) for x, y in pairs]).mean()
    if task_weight == 0:
        return features
    return task_weight * _task(ours.logits, theirs, batch, head) + (1 - task_weight) * features


def _task(logits: Tensor, teacher: Any, batch: Batch, head: str) -> Tensor:
    if head == "MaskedLM":
        return losses_of(logits[batch.labels >= 0], batch) / len(batch.tokens)
    if logits.shape[1] == 1:
        return F.mse_loss(logits, teacher.logits)
    return F.kl_div(logits.log_softmax(1), teacher.logits.log_softmax(1), reduction="batchmean", log_target=True)
