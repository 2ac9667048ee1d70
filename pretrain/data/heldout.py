"""Held-out rows in fixed blocks, and the entropy that a model without context reaches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_prep.shards.reader import Dataset
from pretrain.data.batches import Batcher, MicroBatch
from sharebert_common.errors import BadInput

MASK_SEED = 0
"""Validation masks do not depend on a run's seed, so that runs with different seeds compare."""

READ_ROWS = 4_096


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
    hide: Literal["chosen", "all"] = "chosen",
) -> Iterator[Block]:
    """The validation rows of all datasets, one after another, in blocks; rank r takes r, r + ranks, ….

    All ranks get as many blocks as each other, because a forward pass is a collective under ZeRO 3.

    Args:
        datasets: as `pretrain.data.loader.open_datasets` gives them.
        mask_rate: share of a row's tokens to predict.
        whole_word: choose whole words.
        block_rows: rows of a block. Fixes the blocks, and with them the last digits of the loss.
        rank: of this process.
        world_size: how many processes share the blocks.
        rows: at most this many rows; all where None.
        hide: "chosen" puts [MASK] in place of every token to predict; "all" in place of every
            ordinary token of the row, and the same tokens are to be predicted, without context.

    Raises:
        BadInput: there is no validation row.
    """
    batcher = Batcher(datasets, "validation", mask_rate=mask_rate, whole_word=whole_word, seed=MASK_SEED)
    ends = np.cumsum([split.rows for split in batcher.splits])
    total = int(ends[-1]) if rows is None else min(rows, int(ends[-1]))
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
        first = ends[dataset] - np.array([split.rows for split in batcher.splits])[dataset]
        (batch,) = batcher.make(
            dataset, np.zeros_like(places), places - first, counts=counts, micro_rows=block_rows, hide=hide
        )
        yield Block(number if number < blocks else None, batch)


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
