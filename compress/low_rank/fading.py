"""PC-LoRA: the matrices fade out while low-rank products learn to take their place.

Hwang et al., "PC-LoRA: Low-Rank Adaptation for Progressive Model Compression with Knowledge Distillation"
(arXiv 2406.09117): y = λ(n)·x·W + x·A·B + c, with λ from 1 to 0 over the first part of the training. At the end nothing
of W is left. Here one A·B takes the place of each matrix that layers share; c are the biases of the layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import cos, pi, sin
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sharebert.shared_linear import LowRank
from sharebert.sharing import SameForAll, Weights

Schedule = Literal["linear", "sine", "cosine"]


def base_share(schedule: Schedule, progress: float) -> float:
    """λ after a part `progress` of the fading, 1 at 0 and 0 from 1 on.

    linear falls evenly; sine falls fast first, cosine slowly first and last.
    """
    p = min(1.0, max(0.0, progress))
    if p == 1.0:
        return 0.0
    return {"linear": 1 - p, "sine": 1 - sin(pi / 2 * p), "cosine": (1 + cos(pi * p)) / 2}[schedule]


class FadingMatrices(nn.Module):
    """A `Sharing` whose matrices are λ·(W - subtracted) + A·B. A and B are its parameters, W is fixed."""

    def __init__(self, matrices: Mapping[str, Tensor], products: Mapping[str, LowRank], *, from_zero: bool) -> None:
        """Matrices [in, out] and the products at the start, by the names of `Weights` and `pooler`.

        `from_zero`: B starts at zero and W fades out, as in the paper. Otherwise what fades out is W without the A·B of
        the start, so that the model at the start is the same and less has to be learned.
        """
        super().__init__()
        self.share = 1.0
        """λ."""
        self.names = list(matrices)
        for name, matrix in matrices.items():
            a, b = products[name]
            self.register_buffer(f"{name}_base", matrix.clone() if from_zero else matrix - a @ b)
            self.register_parameter(f"{name}_a", nn.Parameter(a.clone()))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.zeros_like(b) if from_zero else b.clone()))

    def forward(self, encoder: Any, pooler: bool) -> SameForAll:
        """The matrices of one forward pass; at λ = 0 they are the products alone."""
        made: dict[str, Any] = {name: self._made(name) for name in self.names if name != "pooler" or pooler}
        last = made.pop("pooler", None)
        return SameForAll(Weights(**made), last)

    def _made(self, name: str) -> Tensor:
        product = getattr(self, f"{name}_a") @ getattr(self, f"{name}_b")
        return product if self.share == 0 else product + self.share * getattr(self, f"{name}_base")

    def products(self) -> dict[str, LowRank]:
        """A and B of each matrix."""
        return {
            name: LowRank(getattr(self, f"{name}_a").detach(), getattr(self, f"{name}_b").detach())
            for name in self.names
        }
