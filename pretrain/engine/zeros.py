"""Training of pruned weights: those that are zero stay zero.

The gradient of a weight that is zero is set to zero, before anything else sees it. Then AdamW's and LAMB's moments of
it are zero, and so are its updates and its decay: a zero minus zero. So the mask needs no place in a checkpoint: it is
where the weights are zero.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from exports.packed import is_pruned
from sharebert import ShareBertForMaskedLM


def keep_zeros(model: ShareBertForMaskedLM) -> None:
    """From now on, gradients do not reach weights that are zero, of the matrices that `prune_weights` takes."""
    for name, parameter in model.named_parameters():
        if is_pruned(name):
            parameter.register_hook(partial(_where_not_zero, parameter))


def _where_not_zero(parameter: Tensor, gradient: Tensor) -> Tensor:
    return gradient * (parameter.detach() != 0)
