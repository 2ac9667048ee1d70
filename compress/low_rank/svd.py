"""A matrix as a product of two small ones that is nearest to it, as calibration rows see it.

With C = E[x·xᵀ] of what a matrix W [in, out] is multiplied by, summed over the layers that share it, the error of A·B
on the calibration rows is ‖C^½·(W - A·B)‖², and the least one comes from the truncated SVD of C^½·W (Eckart, Young).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.low_rank.factor import roots
from sharebert.shared_linear import LowRank


def truncated(matrix: Tensor, rank: int, second_moment: Tensor | None = None) -> LowRank:
    """The nearest product of rank `rank`, at most the smaller side, in float32.

    Args:
        matrix: W [in, out].
        rank: columns of A and rows of B.
        second_moment: C [in, in]; None: the plain truncated SVD.
    """
    w = matrix.double()
    root, back = (None, None) if second_moment is None else roots(second_moment.double())
    u, s, v = torch.linalg.svd(w if root is None else root @ w, full_matrices=False)
    rank = min(rank, len(s))
    half = s[:rank].sqrt()
    a = u[:, :rank] * half
    a = a if back is None else back @ a
    return LowRank(a.float().contiguous(), (half[:, None] * v[:rank]).float().contiguous())
