"""Activation-aware weight quantisation of nn.Linear: factors of input channels, and clipping of groups.

Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", MLSys 2024.
Products that read one input X [tokens, in] get one factor s for each of its channels: W·s is rounded, and 1/s goes into
what makes X. s = mean|X|^α / √(max·min), with the α of a grid for which Σ ‖X·Wᵀ − X·(Q(W·s)/s)ᵀ‖² is least.
All errors of outputs are computed from the second moments XᵀX [in, in] of the input: ‖X·Δᵀ‖² = tr(Δ·XᵀX·Δᵀ).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GRID = 20
"""Values of α and of clips that are tried, as in the authors' code."""

SMALLEST = 1e-4
"""A channel's factor before it is normalised is at least this, as in the authors' code."""

LEAST_RANGE = 1e-5
"""The largest number of a group is at least this, as in the authors' code."""

ROWS_AT_ONCE = 256
"""Output channels of which clips are searched together; bounds memory."""


class Grid(NamedTuple):
    """How a matrix [out, in] is rounded: each group of neighbours in a row has a scale; codes lie around 0."""

    bits: int
    group: int
    """Neighbours that share a scale; it divides `in`."""

    @property
    def highest(self) -> int:
        """The highest code; the lowest is its negative."""
        return 2 ** (self.bits - 1) - 1


class Codes(NamedTuple):
    """A rounded matrix: w = code·scale."""

    codes: Tensor
    """[out, in] int8."""
    scales: Tensor
    """[out, groups], in values that float16 has."""

    def values(self) -> Tensor:
        """The numbers that the codes stand for, float32 [out, in]."""
        return (self.codes.view(*self.scales.shape, -1) * self.scales[..., None].float()).flatten(1)


def rounded(weight: Tensor, grid: Grid, clip: Tensor | None = None) -> Codes:
    """A matrix [out, in] as codes. `clip` [out, groups] is the share of each group's range that codes cover."""
    groups = weight.unflatten(1, (-1, grid.group))
    largest = groups.abs().amax(2).clamp(min=LEAST_RANGE) * (1.0 if clip is None else clip)
    scales = (largest / grid.highest).half().float()
    codes = torch.round(groups / scales[..., None]).clamp(-grid.highest, grid.highest)
    return Codes(codes.flatten(1).to(torch.int8), scales)


def output_error(weight: Tensor, values: Tensor, moments: Tensor) -> float:
    """Σ ‖X·Wᵀ − X·Vᵀ‖² of a matrix W [out, in] and its rounded values V, from XᵀX [in, in]."""
    difference = values - weight
    return float(((difference @ moments) * difference).sum())


def factors(importance: Tensor, alpha: float) -> Tensor:
    """s [in] for one α, from mean|X| of each channel [in]."""
    s = importance.pow(alpha).clamp(min=SMALLEST)
    return s / (s.max() * s.min()).sqrt()


class Found(NamedTuple):
    """The best factors, and what they gain."""

    factors: Tensor
    """s [in]."""
    alpha: float
    error: float
    """The output error with them."""
    plain_error: float
    """The output error without factors (α = 0)."""


def best_factors(weights: Sequence[Tensor], importance: Tensor, moments: Tensor, grid: Grid) -> Found:
    """The factors of the input channels of products that read one input.

    Args:
        weights: their matrices, each [out, in].
        importance: mean|X| of each channel, [in].
        moments: XᵀX, [in, in].
        grid: how they are rounded.
    """
    best, plain = (torch.inf, 0.0), torch.inf
    for step in range(GRID):
        s = factors(importance, step / GRID)
        error = sum(output_error(w, rounded(w * s, grid).values() / s, moments) for w in weights)
        plain = error if step == 0 else plain
        best = min(best, (error, step / GRID))
    return Found(factors(importance, best[1]), best[1], best[0], plain)


def best_clips(weight: Tensor, moments: Tensor, grid: Grid) -> Tensor:
    """The share of each group's range, from all down to half of it, with the least error of that group's part of the
    output, [out, groups]."""
    count = weight.shape[1] // grid.group
    parts = moments.view(count, grid.group, count, grid.group)
    blocks = torch.stack([parts[g, :, g] for g in range(count)])  # [groups, group, group]
    found = []
    for rows in weight.split(ROWS_AT_ONCE):
        best = torch.ones(len(rows), count)
        least = torch.full_like(best, torch.inf)
        for step in range(GRID // 2):
            clip = torch.full_like(best, 1 - step / GRID)
            difference = (rounded(rows, grid, clip).values() - rows).unflatten(1, (count, grid.group))
            error = torch.einsum("ogi,gij,ogj->og", difference, blocks, difference)
            better = error < least
            best, least = torch.where(better, clip, best), torch.where(better, error, least)
        found.append(best)
    return torch.cat(found)
