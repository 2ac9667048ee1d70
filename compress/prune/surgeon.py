"""Optimal BERT Surgeon: which weights cost least, and how the others make up for them.

Kurtic et al., "The Optimal BERT Surgeon" (EMNLP 2022). F = λI + (1/m)·Σ_i g_i·g_iᵀ over m gradients, in blocks on the
diagonal: neighbours of a row are a block. To remove weight q costs w_q² / (2·[F⁻¹]_qq). To remove the set Q of a block
moves all its weights by -F⁻¹[:, Q]·(F⁻¹[Q, Q])⁻¹·w_Q, which for one weight is -w_q / [F⁻¹]_qq · F⁻¹·e_q.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS_AT_ONCE = 32768
"""Blocks that are computed with together, so that what is made on the way stays small beside F⁻¹."""


def blocked(matrix: Tensor, size: int) -> Tensor:
    """A matrix [rows, columns] as blocks of neighbours of a row, [blocks, size]; the last of a row is filled by 0."""
    missing = -matrix.shape[1] % size
    return torch.nn.functional.pad(matrix, (0, missing)).reshape(-1, size)


def unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The matrix of which `blocked` made these blocks."""
    return blocks.reshape(shape[0], -1)[:, : shape[1]]


class InverseFisher:
    """F⁻¹ in blocks [blocks, size, size], from gradients that come a few at a time (Woodbury)."""

    def __init__(self, blocks: int, size: int, gradients: int, damping: float) -> None:
        """`gradients` is m, how many there will be; `damping` is λ."""
        self.gradients = gradients
        self.inverse = (torch.eye(size) / damping).repeat(blocks, 1, 1)

    def add(self, gradients: Tensor) -> None:
        """Take k more gradients, [k, blocks, size]: F + GᵀG/m has the inverse F⁻¹ - F⁻¹Gᵀ(mI + GF⁻¹Gᵀ)⁻¹GF⁻¹."""
        pairs = zip(gradients.split(BLOCKS_AT_ONCE, 1), self.inverse.split(BLOCKS_AT_ONCE), strict=True)
        for some, inverse in pairs:
            g = some.transpose(0, 1)  # [blocks, k, size]
            moved = g @ inverse
            inner = moved @ g.transpose(1, 2)
            inner.diagonal(dim1=1, dim2=2).add_(self.gradients)
            inverse -= moved.transpose(1, 2) @ torch.linalg.solve(inner, moved)

    @property
    def diagonal(self) -> Tensor:
        """[F⁻¹]_qq of every weight, [blocks, size]."""
        return self.inverse.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(torch.float32).tiny)


def saliency(weights: Tensor, inverse: InverseFisher) -> Tensor:
    """What the loss grows by when each weight alone is removed, w²/(2[F⁻¹]_qq), [blocks, size]."""
    return weights**2 / (2 * inverse.diagonal)


def without(weights: Tensor, removed: Tensor, inverse: InverseFisher) -> Tensor:
    """The weights [blocks, size] after those in `removed` (bool) became zero and the others of a block made up."""
    parts = zip(*(part.split(BLOCKS_AT_ONCE) for part in (weights, removed, inverse.inverse)), strict=True)
    return torch.cat([_without(*part) for part in parts])


def _without(weights: Tensor, removed: Tensor, inverse: Tensor) -> Tensor:
    both = removed[:, :, None] & removed[:, None, :]
    system = torch.where(both, inverse, 0.0)
    system.diagonal(dim1=1, dim2=2).add_((~removed).float())
    shares = torch.linalg.solve(system, torch.where(removed, weights, 0.0)[:, :, None])
    moved = weights - (inverse @ shares)[:, :, 0]
    return torch.where(removed, 0.0, moved)
