"""A vector for each word of some rows, from each layer of a frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from scoring.encoders import Encoder
from scoring.probe.words import Row
from sharebert_common.errors import BadInput

BATCH = 64
"""Rows that are run at once."""


def word_vectors(encoder: Encoder, model: nn.Module, rows: Sequence[Row], device: torch.device) -> Tensor:
    """The mean over the tokens of each word, [layers + 1, words, H]; layer 0 is the embeddings.

    Args:
        encoder: of the model.
        model: one that `encoder` built, in evaluation mode, on `device`.
        rows: the rows; the words of all of them stand one after the other.
        device: where the model is.

    Raises BadInput: a row has more tokens than the model has positions, or the tokenizer does not tell which
    characters a token stands for.
    """
    if not encoder.tokenizer.is_fast:
        raise BadInput(f"{encoder.folder}: probe needs a tokenizer with a tokenizer.json")
    given: Any = encoder.tokenizer([" ".join(row.words) for row in rows], return_offsets_mapping=True)
    longest = max(map(len, given["input_ids"]))
    if longest > encoder.positions:
        raise BadInput(
            f"probe.words: a row has {longest} tokens, and {encoder.folder} has {encoder.positions} positions; lower it"
        )
    encoded = encoder.usable(given)
    left = encoder.tokenizer.padding_side == "left"
    firsts = list(accumulate((len(row.words) for row in rows), initial=0))
    words = [_words_of_tokens(row, spans) for row, spans in zip(rows, given["offset_mapping"], strict=True)]
    lengths = encoded.lengths()
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    total: Tensor | None = None
    counts = torch.zeros(firsts[-1])
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        inputs = {name: values.to(device) for name, values in encoder.collate(encoded, batch).items()}
        with torch.inference_mode():
            states = torch.stack(model(**inputs, output_hidden_states=True).hidden_states).float().cpu()
        width = states.shape[2]
        places, targets = [], []
        for number, row in enumerate(batch):
            shift = number * width + (width - lengths[row] if left else 0)
            for token, word in enumerate(words[row]):
                if word is not None:
                    places.append(shift + token)
                    targets.append(firsts[row] + word)
        if total is None:
            total = torch.zeros(len(states), firsts[-1], states.shape[3])
        total.index_add_(1, torch.tensor(targets, dtype=torch.int64), states.flatten(1, 2)[:, places])
        counts.index_add_(0, torch.tensor(targets, dtype=torch.int64), torch.ones(len(targets)))
    assert total is not None
    return total.div_(counts.clamp(min=1)[:, None])


def _words_of_tokens(row: Row, spans: Sequence[tuple[int, int]]) -> list[int | None]:
    """For each token, given as the characters [first, last) of the joined row, the number of its word in the row."""
    of_character = [number for number, word in enumerate(row.words) for _ in range(len(word) + 1)]
    return [of_character[last - 1] if last > first else None for first, last in spans]
