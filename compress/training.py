"""The loop of steps that train on calibration rows: AdamW, on the CPU, and it goes on after its last save."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibrate import Batch
from compress.saved_state import save_state, saved_state
from exports.export import Export
from exports.weight_source import all_tensors
from pretrain.engine.optimizer import ScheduleRecipe, learning_rate
from sharebert.heads import ShareBertForMaskedLM
from sharebert_common.errors import BadInput

SAVE_EVERY = 100
"""Steps between two saves."""

WARM_UP = 0.05
"""Part of the steps in which the learning rate rises."""


def train(
    groups: Sequence[dict[str, Any]],
    loss_of: Callable[[int, Batch], Tensor],
    rows: Sequence[Batch],
    steps: int,
    seed: int,
    path: Path,
    say: Callable[[int, float], None],
    with_gradients: Callable[[], None] | None = None,
) -> None:
    """Train in `steps` steps, each on one batch. The learning rates rise over the first steps, and fall as a cosine.

    Args:
        groups: of parameters, as AdamW takes them: `params` and `lr`, the highest rate. With `constant: True` the rate
            neither rises nor falls. Gradients of a group are clipped at the norm 1.
        loss_of: is given the number of the step, from 1, and the batch.
        rows: batches; they come in one random order after the other.
        steps: in all.
        seed: decides the order.
        path: of the saved state. If it is there, parameters and optimizer are those of the save, and steps go on.
        say: is given the step and the loss when the state was saved.
        with_gradients: is called in each step after the gradients are computed, before parameters change.

    Raises BadInput: the loss is not finite.
    """
    optimizer = torch.optim.AdamW([dict(group) for group in groups], weight_decay=0.0)
    highest = [group["lr"] for group in groups]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    schedule, first = ScheduleRecipe(warmup=max(1, round(WARM_UP * steps)), decay="cosine"), 0
    if (kept := saved_state(path)) is not None:
        first = kept["step"]
        optimizer.load_state_dict(kept["optimizer"])
        with torch.no_grad():
            for parameter, value in zip(trained, kept["parameters"], strict=True):
                parameter.copy_(value)
    for step, number in enumerate(batch_order(len(rows), steps, seed), 1):
        if step <= first:
            continue
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate if group.get("constant") else learning_rate(step, steps, rate, schedule)
        optimizer.zero_grad()
        loss = loss_of(step, rows[number])
        if not torch.isfinite(loss):
            raise BadInput(f"the loss is {loss.item()} at step {step} of {steps}; lower the learning rate of this step")
        loss.backward()  # type: ignore[no-untyped-call]
        if with_gradients is not None:
            with_gradients()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        if step % SAVE_EVERY == 0 or step == steps:
            save_state(path, {"step": step, "optimizer": optimizer.state_dict(), "parameters": trained})
            say(step, loss.item())


def batch_order(count: int, steps: int, seed: int) -> Iterator[int]:
    """The numbers of the batches of all steps: one random order after the other."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        for number in torch.randperm(count, generator=generator).tolist()[: steps - done]:
            yield number
            done += 1


def biases_and_norms(model: ShareBertForMaskedLM) -> dict[str, nn.Parameter]:
    """Parameters of the layers, and the last norm: what belongs to no matrix."""
    parts = ("sharebert.layers.", "sharebert.final_norm.")
    return {name: parameter for name, parameter in model.named_parameters() if name.startswith(parts)}


def with_biases(export: Export, model: ShareBertForMaskedLM) -> Export:
    """The export with the `biases_and_norms` of a model that started from it, where it may have been trimmed."""
    tensors = all_tensors(export.weights)
    tensors |= {name: parameter.detach() for name, parameter in biases_and_norms(model).items()}
    keys = {key: value for key, value in export.other_keys.items() if not key.startswith("trimmed")}
    return dataclasses.replace(export.with_model(export.config, tensors), other_keys=keys)
