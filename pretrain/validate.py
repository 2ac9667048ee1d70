"""Validation: loss and accuracy on held-out rows, one number on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass as recipe_dataclass

from data_prep.shards.reader import Dataset
from pretrain.data.batches import Batcher, MicroBatch
from pretrain.distributed import Refused
from pretrain.objective import Model, Objective
from sharebert_common.errors import BadInput
from sharebert_common.progress import Progress, progress
from sharebert_common.recipe import STRICT

MASK_SEED = 0
"""Validation masks do not depend on a run's seed, so that runs with different seeds compare."""

READ_ROWS = 4_096
"""Rows that are counted at once."""


@recipe_dataclass(config=STRICT, kw_only=True)
class ValidateRecipe:
    """When the model is validated, and on how many rows."""

    every: Annotated[int, Field(ge=0)] = 500
    """Optimizer steps between validations, with one before the first step and one at the end; 0 for none."""
    rows: Annotated[int, Field(gt=0)] = 2048
    """Rows of the validation split that are used, the same each time; all of them where it has fewer. Of several
    datasets, by their weights."""
    block: Annotated[int, Field(gt=0)] = 32
    """Rows that go through the model at once."""
    ema: bool = False
    """Score the moving average of the weights (optimizer.ema) in place of the weights, once it has begun."""


class Score(NamedTuple):
    """Means over the chosen positions."""

    loss: float
    """Cross-entropy in nats."""
    accuracy: float
    """Fraction whose likeliest word is the right one."""


@dataclass(frozen=True)
class Block:
    """A fixed set of validation rows, whatever the number of ranks."""

    number: int | None
    """Its place in the order of summation; None for a block that only keeps this rank in step."""
    batch: MicroBatch
    """Always of `block_rows` rows; weights are 0 in rows that only fill up the last block."""


def validation_blocks(
    datasets: Sequence[Dataset],
    *,
    mask_rate: float,
    whole_word: bool,
    block_rows: int,
    rank: int = 0,
    world_size: int = 1,
    rows: int | None = None,
    weights: Sequence[float] | None = None,
    hide: Literal["chosen", "all"] = "chosen",
) -> Iterator[Block]:
    """The first validation rows of each dataset, one dataset after another, in blocks; rank r takes r, r + ranks, ….

    All ranks get equally many blocks, because a forward pass is a collective under ZeRO 3.

    Args:
        datasets: from `pretrain.data.datasets.open_datasets`.
        mask_rate: share of a row's tokens to predict.
        whole_word: mask whole words.
        block_rows: rows of a block. Fixes the blocks, and with them the last digits of the loss.
        rank: of this process.
        world_size: how many processes share the blocks.
        rows: at most this many rows; all where None.
        weights: of the datasets in these rows, as in `rows_of_each`.
        hide: "chosen" puts [MASK] in place of every token to predict; "all" in place of every
            ordinary token of the row, and the same tokens are to be predicted, without context.

    Raises:
        BadInput: there is no validation row.
    """
    batcher = Batcher(datasets, "validation", mask_rate=mask_rate, whole_word=whole_word, seed=MASK_SEED)
    counts_of = rows_of_each([split.rows for split in batcher.splits], weights, rows)
    ends = np.cumsum(counts_of)
    total = int(ends[-1])
    if total == 0:
        raise BadInput("the validation split is empty; prepare the dataset with `validation` above 0")
    blocks = -(-total // block_rows)
    for turn in range(-(-blocks // world_size)):
        number = turn * world_size + rank
        start = min(number, blocks - 1) * block_rows
        places = np.arange(start, start + block_rows)
        counts = (places < total) & (number < blocks)
        places = np.minimum(places, total - 1)
        dataset = np.searchsorted(ends, places, side="right")
        first = (ends - counts_of)[dataset]
        (batch,) = batcher.make(
            dataset, np.zeros_like(places), places - first, counts=counts, micro_rows=block_rows, hide=hide
        )
        yield Block(number if number < blocks else None, batch)


def rows_of_each(held: Sequence[int], weights: Sequence[float] | None, rows: int | None) -> NDArray[np.int64]:
    """How many validation rows of each dataset are used, [datasets].

    Args:
        held: rows that each has.
        weights: in whose proportion `rows` are shared out; what a dataset has not comes from the others. None: equal.
        rows: in all, at most; None for all that there are.
    """
    if rows is None or rows >= sum(held):
        return np.asarray(held, np.int64)
    weights = weights or [1.0] * len(held)
    # As in a mixture, row i of a dataset of weight w stands at (i + 1/2) / w.
    places = [(np.arange(min(count, rows)) + 0.5) / weight for count, weight in zip(held, weights, strict=True)]
    dataset = np.repeat(np.arange(len(held)), [len(each) for each in places])
    first = np.lexsort((dataset, np.concatenate(places)))[:rows]
    return np.bincount(dataset[first], minlength=len(held))


def validate(
    objective: Objective,
    model: Model,
    datasets: Sequence[Dataset],
    recipe: ValidateRecipe,
    *,
    mask_rate: float,
    whole_word: bool,
    weights: Sequence[float] | None = None,
    rank: int = 0,
    world_size: int = 1,
    hide: Literal["chosen", "all"] = "chosen",
    progress: Progress = progress,
) -> Score:
    """Score held-out rows in fixed blocks, summed in block order in float64.

    Each block goes through the model on one rank, always as the same rows, so the result is one number for
    any number of ranks. Every rank makes equally many forward passes: under ZeRO 3 each is a collective.

    Args:
        objective: makes the losses of a block.
        model: in evaluation mode.
        datasets: of the run.
        recipe: which rows.
        mask_rate: share of a row's tokens to predict.
        whole_word: whether whole words are masked.
        weights: as in `validation_blocks`.
        rank: of this process.
        world_size: of the group.
        hide: as in `validation_blocks`.
        progress: shows how far it is.

    Raises Refused, on every rank, where the rows have no ordinary word.
    """
    turns = -(-min(recipe.rows, sum(dataset.split("validation").rows for dataset in datasets)) // recipe.block)
    turns = -(-turns // world_size)
    sums = torch.zeros(-(-recipe.rows // recipe.block), 3, dtype=torch.float64)
    blocks = validation_blocks(
        datasets,
        mask_rate=mask_rate,
        whole_word=whole_word,
        block_rows=recipe.block,
        rank=rank,
        world_size=world_size,
        rows=recipe.rows,
        weights=weights,
        hide=hide,
    )
    with torch.no_grad():
        for block in progress(blocks, "validation", turns):
            found = objective(model, block.batch)
            if block.number is not None:
                sums[block.number, :2] = torch.stack([found.loss, found.correct]).cpu()
                sums[block.number, 2] = block.batch.loss_weights.sum()
    if world_size > 1:
        dist.all_reduce(sums)  # each element comes from one rank, so the sum is exact
    loss, correct_count, weight = (sum(column) for column in sums.T.tolist())
    if not weight:
        raise Refused(
            f"{datasets[0].path}: the validation rows hold no ordinary word (special ones, such as [UNK], alone), so "
            "there is nothing to predict; prepare it with others, or train with validate.every=0"
        )
    return Score(loss / weight, correct_count / weight)


def refuse_nothing_to_validate(datasets: Sequence[Dataset], recipe: ValidateRecipe) -> None:
    """Raise BadInput where validation is asked for and there are no held-out rows."""
    if recipe.every and not any(dataset.split("validation").rows for dataset in datasets):
        raise BadInput(
            f"{datasets[0].path}: has no validation rows; prepare it with some, or train with validate.every=0"
        )


def unigram_entropy(dataset: Dataset, split: str = "train") -> float:
    """The entropy, in nats, of a split's distribution of ordinary tokens (special ones and padding left out).

    The loss of a model that knows how frequent each word is and nothing of the context. Reads the
    split once, in constant memory; 0.0 where it has no ordinary token.
    """
    source = dataset.split(split)
    counts = np.zeros(dataset.vocab_size, np.int64)
    for start in range(0, source.rows, READ_ROWS):
        tokens, document_ids = source.read(np.arange(start, min(start + READ_ROWS, source.rows)))
        counts += np.bincount(tokens[document_ids != 0], minlength=dataset.vocab_size)
    counts[list(dataset.special_ids.values())] = 0
    shares = counts[counts > 0] / max(1, counts.sum())
    return float((shares * -np.log(shares)).sum())
