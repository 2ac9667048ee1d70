"""Which directions of the residual stream stay, in a model whose LayerNorms stand before the blocks (pre-LN).

SP3 (Hu et al., "SP3: Enhancing Structured Pruning via PCA Projection", 2023) keeps principal components. So that an
unchanged LayerNorm gives what it gave before: only x − mean(x) of the stream x [H] is ever read, so it may lie in the
H − 1 directions that are orthogonal to 1; of these, the k − 1 principal ones P [H, k−1] stay, and one more, empty,
direction. A Householder reflection turns the empty direction onto 1/√k, so that the new stream has mean zero. With
z = √(k/H)·Bᵀx, B = [P, 0]·R, the variance of z is that of BBᵀx, so that epsilon stays as it is, and

    norm(BBᵀx) = √(H/k)·B·norm(z),     norm(x) = (x − mean(x)) / √(variance(x) + ε).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Directions(NamedTuple):
    """How a stream x [H] becomes a stream z [k], and how what reads it is changed."""

    down: Tensor
    """[H, k]: z = x · down."""
    up: Tensor
    """[k, H]: norm(z) · up stands for norm(x)."""


def components(moments: Tensor) -> Tensor:
    """The principal components of norm(x), [H, H − 1]: columns that are orthonormal, the one that holds most first.

    Args:
        moments: sum of norm(x)ᵀ·norm(x) over calibration rows, [H, H] float64.
    """
    centred = reflection(len(moments), moments.dtype)[:, :-1]  # an orthonormal basis of what is orthogonal to 1
    _, vectors = torch.linalg.eigh(centred.t() @ moments @ centred)
    return centred @ vectors.flip(1)


def along(kept: Tensor) -> Directions:
    """The directions of components [H, k − 1] that stay, and an empty one; k is from 2 to H."""
    width, size = len(kept), kept.shape[1] + 1
    basis = kept @ reflection(size, kept.dtype)[:-1]
    factor = (size / width) ** 0.5
    return Directions(basis * factor, basis.t() / factor)


def largest(magnitudes: Tensor, size: int) -> Directions:
    """The `size` channels with the largest magnitudes [H]."""
    kept = strongest(magnitudes, size)
    chosen = torch.eye(len(magnitudes), dtype=magnitudes.dtype)[:, kept]
    return Directions(chosen, chosen.t())


def strongest(scores: Tensor, count: int) -> Tensor:
    """Numbers of the `count` largest scores, ascending."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def reflection(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The symmetric orthogonal matrix [size, size] that exchanges the last unit vector and 1/√size."""
    v = torch.full((size,), -(size**-0.5), dtype=dtype)
    v[-1] += 1
    return torch.eye(size, dtype=dtype) - 2 / (v @ v) * torch.outer(v, v)
