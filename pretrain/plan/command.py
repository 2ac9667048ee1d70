"""What `sharebert plan` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from pretrain.plan.estimate import Assumptions, make_plan, shape_of
from pretrain.plan.measure import measure
from pretrain.plan.memory import memory
from pretrain.plan.text import beside, compare, describe
from sharebert_common.errors import BadInput

if TYPE_CHECKING:
    from pretrain.recipe import TrainRecipe

MOST_MICRO_BATCHES = 2
"""Micro-batches in a measured step. From the second on, gradients exist while activations do."""


def plan(
    recipe: TrainRecipe,
    gpus: Sequence[int],
    kinds: Sequence[str],
    assumed: Assumptions,
    *,
    with_measure: bool = False,
    as_json: bool = False,
) -> str:
    """Plan a recipe on each kind and number of GPUs.

    Args:
        recipe: of the training; its dataset need not exist.
        gpus: numbers of GPUs.
        kinds: keys of `pretrain.plan.gpus.GPUS`.
        assumed: what the recipe does not say.
        with_measure: run a few steps on this machine as well.
        as_json: one JSON object instead of text.

    Raises BadInput, naming the key or the option.
    """
    if with_measure and recipe.data.micro_batch == "auto":
        raise BadInput("--measure: data.micro_batch is auto; give it a number of rows that this machine shall compute")
    plans = [make_plan(recipe, number, kind, assumed) for kind in kinds for number in gpus]
    parts = [compare(plans) if len(plans) > 1 else describe(plans[0])]
    values: dict[str, Any] = {"plans": [one.to_dict() for one in plans]}
    if with_measure:
        training = recipe.resolve(gpus[0], needs_data=False)
        micro_batches = min(MOST_MICRO_BATCHES, training.micro_batches)
        measured = measure(recipe, micro_batches=micro_batches, micro_rows=training.micro_rows)
        here = shape_of(recipe, training, 1, cuda=torch.cuda.is_available())
        predicted = memory(training.model.config, here)
        parts.append(beside(predicted, measured, plans[0].flops_per_token))
        values["measured"] = measured._asdict() | {"predicted": asdict(predicted) | {"total": predicted.total}}
    return json.dumps(values, indent=1) if as_json else "\n\n".join(parts)
