"""The tensors of a trimmed model: what its export stores, and all that the model has.

A trimmed model computes the same as the one that it was made from, with tensors that are zero by construction
(`compress/trim.py` says why). Its export leaves those out, and keeps of W_all and b_all only the last rows, from which
matrices are cut. Its `config.json` says `trimmed: true`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

ZERO = re.compile(
    r"sharebert\.layers\.\d+\.(key_bias|value_bias|attention_norm\.bias|ffn_norm\.bias)|sharebert\.pooler_bias"
)
"""Names of the tensors that are zero in a trimmed model. The pooler's bias is so only where its matrix is left out."""

ROWS = ("sharebert.factor_linear_all.weight", "sharebert.factor_linear_all.bias")
"""W_all [H, F] and b_all [H]. A trimmed export stores their last rows."""


def stored_tensors(tensors: Mapping[str, Tensor], used_rows: int, *, pooler: bool) -> dict[str, Tensor]:
    """What a trimmed export stores of all tensors of a model.

    Args:
        tensors: all of them, by the names of an export.
        used_rows: rows of W_all from which matrices are cut.
        pooler: whether the pooler is one of them.
    """
    kept = {}
    for name, tensor in tensors.items():
        if name in ROWS:
            kept[name] = tensor[len(tensor) - used_rows :]
        elif not ZERO.fullmatch(name) or (pooler and name == "sharebert.pooler_bias"):
            kept[name] = tensor
    return kept


def full_tensors(shapes: Mapping[str, Iterable[int]], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a model from those that a trimmed export stores. An export that stores all is read as well.

    Args:
        shapes: name and shape of every tensor of the model.
        stored: by name; tensors that the model does not have are kept as they are.
    """
    full = dict(stored)
    like = stored.get("sharebert.final_norm.bias")
    dtype = torch.float32 if like is None else like.dtype
    for name, given in shapes.items():
        shape = tuple(given)
        if name not in stored and ZERO.fullmatch(name):
            full[name] = torch.zeros(shape, dtype=dtype)
        elif name in ROWS and len(stored.get(name, ())) < shape[0] and name in stored:
            full[name] = stored[name].new_zeros(shape)
            full[name][shape[0] - len(stored[name]) :] = stored[name]
    return full
