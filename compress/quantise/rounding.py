"""Numbers → codes and scales, better than the nearest codes of the whole range.

With a search for the range (a narrower one clips a few numbers and rounds all others finer); or by
GPTQ (Frantar et al., ICLR 2023), which rounds column by column and moves each error into the columns that follow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from exports.rounding import Rounded, grid, limits, to_nearest
from sharebert.packed import Packing

CLIPS = 20
"""Ranges that the search tries: from the whole range of a group down to half of it."""


def searched(matrix: Tensor, packing: Packing, weight: Tensor | None = None) -> Tensor:
    """The share of each group's range with the least squared error, in the shape of the scales.

    Args:
        matrix: [rows, columns].
        packing: bits, scheme and groups.
        weight: [columns] or [rows, columns], what a squared error of each element costs; None: the same for all.
    """
    best, best_error = torch.ones(packing.groups), torch.full(packing.groups, torch.inf)
    for step in range(CLIPS):
        keep = torch.full(packing.groups, 1 - step / (2 * CLIPS))
        errors = (to_nearest(matrix, packing, keep).values(packing) - matrix) ** 2
        if weight is not None:
            errors = errors * weight
        total = summed(errors, packing)
        better = total < best_error
        best, best_error = torch.where(better, keep, best), torch.where(better, total, best_error)
    return best


def summed(matrix: Tensor, packing: Packing) -> Tensor:
    """The sum of each group, in the shape of the scales."""
    rows, columns = matrix.shape
    if packing.group < 0:
        return matrix.sum().view(1, 1)
    if packing.group == 0:
        return matrix.sum(1, keepdim=True)
    return F.pad(matrix, (0, -columns % packing.group)).view(rows, -1, packing.group).sum(2)


def gptq(
    matrix: Tensor,
    packing: Packing,
    hessian_of: Callable[[slice], Tensor],
    keep: Tensor | None,
    rows_at_once: int = 512,
) -> Rounded:
    """Round so that Σ_rows δ·H_row·δᵀ is small, δ the error of a row, on the grid of `to_nearest`.

    Args:
        matrix: [rows, columns].
        packing: bits, scheme and groups.
        hessian_of: the Hessians [n, columns, columns] of some rows.
        keep: as in `to_nearest`.
        rows_at_once: how many rows are rounded together.
    """
    rows, columns = matrix.shape
    scales, offsets = grid(matrix, packing, keep)
    step, shift = packing.spread(scales), 0.0 if offsets is None else packing.spread(offsets)
    lowest, highest = limits(packing)
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    for first in range(0, rows, rows_at_once):
        some = slice(first, min(rows, first + rows_at_once))
        hessian = hessian_of(some).double()
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        diagonal += 0.01 * diagonal.mean(1, keepdim=True) + 1e-12
        upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
        left = matrix[some].clone()
        s, o = step[some], shift if isinstance(shift, float) else shift[some]
        for column in range(columns):
            value = left[:, column]
            o_column = o if isinstance(o, float) else o[:, column]
            code = (torch.round((value - o_column) / s[:, column]) + packing.zero).clamp(lowest, highest)
            error = (value - ((code - packing.zero) * s[:, column] + o_column)) / upper[:, column, column]
            left[:, column:] -= error[:, None] * upper[:, column, column:]
            codes[some, column] = code.to(torch.uint8)
    return Rounded(codes, scales, offsets)
