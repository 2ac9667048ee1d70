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

from exports.packed import PRUNED
from sharebert import ShareBertForMaskedLM


def keep_zeros(model: ShareBertForMaskedLM, sparse: Collection[str] = ()) -> None:
    """From now on, gradients do not reach weights of E and W_all that are zero.

    Those of `sparse`, names of tensors as in `config.json`, do not reach the most frequent number of a column either.
    """
    for name, parameter in model.named_parameters():
        if name in PRUNED:
            rows = parameter.detach().mode(0).indices if name in sparse else None
            parameter.register_hook(partial(_where_kept, parameter, rows))


def _where_kept(parameter: Tensor, rows: Tensor | None, gradient: Tensor) -> Tensor:
    """The gradient [rows, columns] of the weights that training may move. `rows` [columns] hold a column's fill."""
    weights = parameter.detach()
    kept = weights != 0
    if rows is not None:
        kept &= weights != weights[rows, torch.arange(len(rows))]
    return gradient * kept
