"""Validation: loss and accuracy on held-out rows, one number on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from pydantic.dataclasses import dataclass

from data_prep.shards.reader import Dataset
from pretrain.data.batches import MicroBatch
from pretrain.data.heldout import validation_blocks
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT


@dataclass(config=STRICT, kw_only=True)
class ValidateRecipe:
    """When the held-out rows are scored, and how many."""

    every: Annotated[int, Field(ge=0)] = 500
    """Optimizer steps between validations, with one before the first step and one at the end; 0 makes none."""
    rows: Annotated[int, Field(gt=0)] = 2048
    """Rows of the validation split that are used, the same ones each time; fewer where it has fewer."""
    block: Annotated[int, Field(gt=0)] = 32
    """Rows that go through the model at once."""


class Score(NamedTuple):
    """Means over the chosen positions."""

    loss: float
    """Cross-entropy in nats."""
    accuracy: float
    """Fraction whose likeliest word is the right one."""


Forward = Callable[[MicroBatch], tuple[torch.Tensor, torch.Tensor]]
"""Maps a batch to (sum of losses, number right), fp32 scalars."""


def validate(
    forward: Forward,
    datasets: Sequence[Dataset],
    recipe: ValidateRecipe,
    *,
    mask_rate: float,
    whole_word: bool,
    rank: int = 0,
    world_size: int = 1,
    hide: Literal["chosen", "all"] = "chosen",
) -> Score:
    """Score held-out rows in fixed blocks, summed in block order in float64.

    Each block goes through the model on one rank, always as the same rows, so the result is one number for
    any number of ranks. Every rank makes equally many forward passes: under ZeRO 3 each is a collective.

    Args:
        forward: the model, in evaluation mode.
        datasets: of the run.
        recipe: which rows.
        mask_rate: share of a row's tokens that are chosen.
        whole_word: whether whole words are chosen.
        rank: of this process.
        world_size: of the group.
        hide: `chosen` puts [MASK] on the chosen positions; `all` on every other word of the row, too.
    """
    sums = torch.zeros(-(-recipe.rows // recipe.block), 3, dtype=torch.float64)
    blocks = validation_blocks(
        datasets,
        mask_rate=mask_rate,
        whole_word=whole_word,
        block_rows=recipe.block,
        rank=rank,
        world_size=world_size,
        rows=recipe.rows,
        hide=hide,
    )
    with torch.no_grad():
        for block in blocks:
            loss_sum, correct = forward(block.batch)
            if block.number is not None:
                sums[block.number, :2] = torch.stack([loss_sum, correct]).cpu()
                sums[block.number, 2] = block.batch.loss_weights.sum()
    if world_size > 1:
        dist.all_reduce(sums)  # each element comes from one rank, so adding loses nothing
    loss, correct_count, weight = (sum(column) for column in sums.T.tolist())
    return Score(loss / weight, correct_count / weight)


def refuse_nothing_to_validate(datasets: Sequence[Dataset], recipe: ValidateRecipe) -> None:
    """Raise BadInput where validation is asked for and there are no held-out rows."""
    if recipe.every and not any(dataset.split("validation").rows for dataset in datasets):
        raise BadInput(
            f"{datasets[0].path}: has no validation rows; prepare it with some, or train with validate.every=0"
        )
