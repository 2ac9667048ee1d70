"""Training of pruned weights: those that are zero stay zero, and those that fill a column stay equal.

The gradient of a weight that is zero is set to zero, before anything else sees it. Then AdamW's and LAMB's moments of
it are zero, and so are its updates and its decay: a zero minus zero. So the mask needs no place in a checkpoint: it is
where the weights are zero. The same holds of the numbers that a sparse tensor fills a column with: only decay moves
them, all by the same factor, so that they stay equal.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor

from exports.packed import is_pruned
from sharebert import ShareBertForMaskedLM


def keep_zeros(model: ShareBertForMaskedLM, sparse: Collection[str] = ()) -> None:
    """From now on, gradients do not reach weights that are zero, of the matrices that `prune_weights` takes.

    Those of `sparse`, names of tensors as in `config.json`, do not reach what several weights of a column are either.
    """
    for name, parameter in model.named_parameters():
        if is_pruned(name):
            parameter.register_hook(partial(_where_kept, parameter, _fill_rows(parameter) if name in sparse else None))


def _fill_rows(parameter: Tensor) -> Tensor:
    """A row [columns] in which each column has the number that several of its weights are; -1: all differ."""
    weights = parameter.detach()
    values, rows = weights.mode(0)
    return torch.where((weights == values).sum(0) > 1, rows, -1)


def _where_kept(parameter: Tensor, rows: Tensor | None, gradient: Tensor) -> Tensor:
    """The gradient [rows, columns] of the weights that training may move; `rows` as `_fill_rows` gives them."""
    weights = parameter.detach()
    kept = weights != 0
    if rows is not None:
        rows = rows.to(weights.device)  # the model was built on the CPU
        kept &= (weights != weights[rows, torch.arange(len(rows), device=rows.device)]) | (rows < 0)
    return gradient * kept
