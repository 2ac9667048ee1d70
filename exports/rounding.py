"""Numbers → the nearest codes, and the numbers that codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sharebert.packed import Packing


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
    return codes.clamp(*limits(packing)).to(torch.uint8)


def limits(packing: Packing) -> tuple[int, int]:
    """The lowest and the highest code; the symmetric scheme leaves out 0, so that codes reach as far down as up."""
    return (1 if packing.scheme == "symmetric" else 0), 2**packing.bits - 1


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
