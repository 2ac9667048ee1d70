"""Factors of columns, so that those that matter most are rounded finest.

Activation-aware weight quantisation (Lin et al., MLSys 2024) along F: columns are multiplied by s = c^α / √(max·min)
before rounding and divided by s after it, with c the root of what a squared error of the column costs on calibration
rows, and α the best of a grid from 0 to 1. α = 0 is no scaling, so on this measure the result is never worse than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exports.rounding import to_nearest
from sharebert.packed import Packing

GRID = 20
"""Values of α that are tried, as in the authors' code."""


def column_factors(matrix: Tensor, packing: Packing, costs: Tensor) -> Tensor:
    """1/s, by which a loader multiplies the columns, float16 [columns].

    Args:
        matrix: [rows, columns].
        packing: bits, scheme and groups.
        costs: [rows, columns], what a squared error of each element costs.
    """
    importance = costs.mean(0).sqrt().clamp(min=1e-12)
    best, best_error = torch.ones(matrix.shape[1]).half(), torch.inf
    for step in range(GRID):
        columns = factors(importance, step / GRID)
        error = float(((scaled_to_nearest(matrix, packing, columns) - matrix) ** 2 * costs).sum())
        if error < best_error:
            best, best_error = columns, error
    return best


def factors(importance: Tensor, alpha: float) -> Tensor:
    """1/s for one α, float16."""
    s = importance**alpha
    s = s / (s.max() * s.min()).sqrt()
    return (1 / s).clamp(1e-3, 1e3).half()


def scaled_to_nearest(matrix: Tensor, packing: Packing, columns: Tensor) -> Tensor:
    """The matrix after rounding, with its columns divided by `columns` while it is rounded."""
    return to_nearest(matrix / columns.float(), packing).values(packing) * columns.float()
