"""The embedding as a product of a lower rank, so that what the product loses costs least.

E [V, F] becomes E'·B with E' [V, F'] and B [F', F]. Every use of E then uses E'·B: the virtual matrix is
E'·(W_all·Bᵀ)ᵀ, and the input path and a tied head multiply by B. Which B is best depends on what an error δ of a row of
E costs. With the closed form δ·H_v·δᵀ of `compress/quantise/hessians.py`, taken as a_v·δ·H·δᵀ with one H for all rows,
B comes from the singular vectors of diag(√a)·E·H^½, and then each row of E' from its own H_v:

    e'_v = e_v·H_v·Bᵀ·(B·H_v·Bᵀ)⁻¹
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AT_ONCE = 512
"""Rows whose Hessians are in memory at once."""


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
    """a [rows] and H [F, F] so that a_v·H is near to H_v: the mean of the diagonal, and the mean of H_v / a_v."""
    traces, total = [], torch.zeros(())
    for first in range(0, rows, AT_ONCE):
        found = hessians(slice(first, min(first + AT_ONCE, rows))).double()
        trace = found.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        traces.append(trace)
        total = total + found.sum(0)
    weights = torch.cat(traces)
    return weights, total / weights.sum()


def projected(embedding: Tensor, matrix: Tensor, hessians: Callable[[slice], Tensor]) -> Tensor:
    """E' [V, F'], float64: each row the one whose product with B costs least by its own Hessian."""
    found = []
    for first in range(0, len(embedding), AT_ONCE):
        rows = slice(first, min(first + AT_ONCE, len(embedding)))
        costs = hessians(rows).double()
        traces = costs.diagonal(dim1=1, dim2=2).mean(1)
        floor = 1e-9 * torch.maximum(traces, traces.max().clamp(min=1e-30) * 1e-3)  # words that nothing uses cost 0
        costs = costs + floor[:, None, None] * torch.eye(costs.shape[1])
        right = matrix @ costs  # [rows, F', F]
        system = right @ matrix.t()
        found.append(torch.linalg.solve(system, (right @ embedding[rows].double()[:, :, None]))[:, :, 0])
    return torch.cat(found)
