"""Numbers → codes and scales.

To the nearest code; with a search for the range (a narrower one clips a few numbers and rounds all others finer); or by
GPTQ (Frantar et al., ICLR 2023), which rounds column by column and moves each error into the columns that follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sharebert.packed import Packing

CLIPS = 20
"""Ranges that the search tries: from the whole range of a group down to half of it."""


class Rounded(NamedTuple):
    """A matrix [rows, columns] as codes."""

    codes: Tensor
    """[rows, columns], from 0 to 2^bits - 1."""
    scales: Tensor
    """As `Packing.groups` says, in the values that float16 has."""
    offsets: Tensor | None
    """Likewise; None for the symmetric scheme."""

    def values(self, packing: Packing) -> Tensor:
        """The numbers that the codes stand for, [rows, columns]."""
        found = (self.codes.float() - packing.zero) * packing.spread(self.scales)
        return found if self.offsets is None else found + packing.spread(self.offsets)


def to_nearest(matrix: Tensor, packing: Packing, keep: Tensor | None = None) -> Rounded:
    """Round each number to the nearest code.

    Args:
        matrix: [rows, columns].
        packing: bits, scheme and groups.
        keep: [groups], the share of each group's range that codes cover; None: all of it.
    """
    scales, offsets = grid(matrix, packing, keep)
    return Rounded(codes_of(matrix, packing, scales, offsets), scales, offsets)


def codes_of(matrix: Tensor, packing: Packing, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """The nearest codes of a matrix on a given grid, uint8."""
    shifted = matrix if offsets is None else matrix - packing.spread(offsets)
    codes = torch.round(shifted / packing.spread(scales)) + packing.zero
    lowest = 1 if packing.scheme == "symmetric" else 0  # so that the codes reach as far down as up
    return codes.clamp(lowest, 2**packing.bits - 1).to(torch.uint8)


def grid(matrix: Tensor, packing: Packing, keep: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets of each group, rounded to float16."""
    low, high = reduced(matrix, packing, torch.amin), reduced(matrix, packing, torch.amax)
    kept = 1.0 if keep is None else keep
    if packing.scheme == "symmetric":
        scales, offsets = torch.maximum(low.abs(), high.abs()) * kept / (2 ** (packing.bits - 1) - 1), None
    elif packing.scheme == "asymmetric":
        middle, half = (high + low) / 2, (high - low) / 2 * kept
        scales, offsets = 2 * half / (2**packing.bits - 1), middle - half
    else:
        scales, offsets = (high - low) * kept / 2**packing.bits, (high + low) / 2
    scales = scales.half().float()
    scales = torch.where(scales > 0, scales, torch.finfo(torch.float16).smallest_normal)  # a group of equal numbers
    return scales, None if offsets is None else offsets.half().float()


def reduced(matrix: Tensor, packing: Packing, over: Callable[..., Tensor]) -> Tensor:
    """`over` (as `torch.amax`) of each group, in the shape of the scales."""
    rows, columns = matrix.shape
    if packing.group < 0:
        return over(matrix).view(1, 1)
    if packing.group == 0:
        return over(matrix, dim=1, keepdim=True)
    missing = -columns % packing.group
    last = matrix[:, -1:].expand(rows, missing)  # repeats a number of the group, which changes no extreme
    return over(torch.cat([matrix, last], 1).view(rows, -1, packing.group), dim=2)


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
    lowest, highest = (1 if packing.scheme == "symmetric" else 0), 2**packing.bits - 1
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
