"""The pseudo-log-likelihood of sentences (Salazar et al., ACL 2020).

Each token is replaced by the mask token, one at a time; the score of a sentence is the sum of the log-probabilities of
the true tokens. Special tokens that the tokenizer adds are not scored.

Sentences of the same length in tokens form batches, so that no row has padding, and equal sentences are scored once: a
pair whose sentences have the same tokens is a tie.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import fsum

import torch

from scoring.blimp.masked_lm import MaskedLM

BATCH_TOKENS = 8192
BATCH_ROWS = 512
"""Most rows of a batch: each needs a float for every word."""

Sentence = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids, and the positions to score."""


def pseudo_log_likelihoods(lm: MaskedLM, sentences: Sequence[str]) -> list[float]:
    """The score of each sentence. `find_problems` must find none."""
    tokenised = _tokenise(lm, sentences)
    by_length: dict[int, list[Sentence]] = defaultdict(list)
    for sentence in dict.fromkeys(tokenised):
        by_length[len(sentence[0])].append(sentence)
    scores: dict[Sentence, float] = {}
    for length, same in sorted(by_length.items()):
        owners = [number for number, (_, positions) in enumerate(same) for _ in positions]
        ids = torch.tensor([ids for ids, _ in same])
        positions = torch.tensor([position for _, positions in same for position in positions], dtype=torch.long)
        values: list[list[float]] = [[] for _ in same]
        rows = max(1, min(BATCH_ROWS, BATCH_TOKENS // length))
        for start in range(0, len(owners), rows):
            owner = torch.tensor(owners[start : start + rows])
            position = positions[start : start + rows]
            batch = ids[owner]
            number = torch.arange(len(batch))
            targets = batch[number, position]
            batch[number, position] = lm.tokenizer.mask_token_id
            for sentence, value in zip(
                owner.tolist(), lm.log_probabilities(batch, position, targets).tolist(), strict=True
            ):
                values[sentence].append(value)
        scores |= {sentence: fsum(found) for sentence, found in zip(same, values, strict=True)}
    return [scores[sentence] for sentence in tokenised]


def find_problems(lm: MaskedLM, sentences: Sequence[str]) -> list[str | None]:
    """For each sentence why the model cannot take it: too many tokens, or an id that the model does not have."""
    found: list[str | None] = []
    for text, (ids, _) in zip(sentences, _tokenise(lm, sentences), strict=True):
        if len(ids) > lm.positions:
            found.append(f"'{text}' has {len(ids)} tokens, and the model has {lm.positions} positions")
        elif max(ids, default=0) >= lm.words:
            found.append(f"the tokenizer gives the id {max(ids)}, but the model has {lm.words} words")
        else:
            found.append(None)
    return found


def _tokenise(lm: MaskedLM, sentences: Sequence[str]) -> list[Sentence]:
    encoded = lm.tokenizer(list(sentences), return_special_tokens_mask=True)
    return [
        (tuple(ids), tuple(position for position, added in enumerate(special) if not added))
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    ]
