"""The embedding as a product of a lower rank, so that what the product loses costs least.

E [V, F] becomes E'·B with E' [V, F'] and B [F', F]. Every use of E then uses E'·B: the virtual matrix is
E'·(W_all·Bᵀ)ᵀ, and the input path and a tied head multiply by B. Which B is best depends on what an error δ of a row of
E costs. With the closed form δ·H_v·δᵀ of `compress/quantise/hessians.py`, taken as a_v·δ·H·δᵀ with one H for all rows,
B comes from the singular vectors of diag(√a)·E·H^½, and E' = E·H·Bᵀ·(B·H·Bᵀ)⁻¹. (To take each row of E' by its own
H_v brought nothing more: a loss of 4.5384 in place of 4.5380 for F 64 → 56.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AT_ONCE = 512
"""Rows whose Hessians are in memory at once."""

SMOOTHING = 0.1
"""Part of the mean cost that every row has beside its own. Words that calibration rows lack would cost almost nothing
otherwise, though a head scores them in every place."""


def basis(embedding: Tensor, rank: int, weights: Tensor | None = None, metric: Tensor | None = None) -> Tensor:
    """B [rank, F], float64: rows that span what is kept of E.

    Args:
        embedding: E [V, F].
        rank: F'.
        weights: a [V], what an error of each row counts; None: 1.
        metric: H [F, F], what an error in each direction counts; None: the identity.
    """
    e = embedding.double()
    weighted = e if weights is None else e * weights.double()[:, None]
    root, back = roots(torch.eye(e.shape[1], dtype=torch.float64) if metric is None else metric.double())
    vectors = torch.linalg.eigh(root @ (e.t() @ weighted) @ root).eigenvectors[:, -rank:].flip(1)
    return vectors.t() @ back


def roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """H^½ and H^-½ of a symmetric matrix; directions that cost almost nothing count a little, so that both exist."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp(min=float(values[-1]) * 1e-9)
    return (vectors * values.sqrt()) @ vectors.t(), (vectors / values.sqrt()) @ vectors.t()


def mean_hessian(hessians: Callable[[slice], Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """a [rows] and H [F, F] so that a_v·H is near to H_v + SMOOTHING·(mean of all): by the means of diagonals."""
    traces, total = [], torch.zeros((), dtype=torch.float64)
    for first in range(0, rows, AT_ONCE):
        found = hessians(slice(first, min(first + AT_ONCE, rows))).double()
        traces.append(found.diagonal(dim1=1, dim2=2).mean(1))
        total = total + found.sum(0)
    weights = torch.cat(traces)
    return weights + SMOOTHING * weights.mean(), total / weights.sum()


def least_squares(embedding: Tensor, matrix: Tensor, metric: Tensor | None) -> Tensor:
    """E' [V, F'], float64, whose product with B [F', F] is nearest to E, with errors measured by the metric [F, F]."""
    weighted = matrix if metric is None else matrix @ metric.double()
    return torch.linalg.solve(weighted @ matrix.t(), weighted @ embedding.double().t()).t()
