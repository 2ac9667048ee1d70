"""Which heads, columns and layers matter, and what remains is rescaled by.

Importance is that of Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (NeurIPS 2022): with a
factor of 1 on each part, and g_n the gradient of the loss of calibration row n by the factors, removing the set R adds
about ½·1_Rᵀ·F·1_R to the loss, F = Σ_n g_n·g_nᵀ. Parts are removed one after the other, each time the one that adds
least with those that are gone already.

Layers share their matrices, so a factor stands on one head or column in all layers at once, and g_n is a sum over the
layers. What one layer alone could spare stays: it costs no bytes, and the layers keep one matrix in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compress.calibrate import Batch, hidden_states, objective
from sharebert.heads import ShareBertForMaskedLM

DAMPING = 0.01
"""Part of the mean diagonal that keeps factors near 1 where calibration rows do not decide them."""


class Fisher(NamedTuple):
    """F of each kind of part, over calibration rows."""

    heads: Tensor
    columns: Tensor
    layers: Tensor


def fisher(model: ShareBertForMaskedLM, rows: Sequence[Batch], seed: int) -> Fisher:
    """F [parts, parts] for heads, columns and layers, from one backward pass a batch."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    sizes = (config.heads, config.inner_size, config.num_hidden_layers)
    sums = [torch.zeros(size, size, dtype=torch.float64) for size in sizes]
    for batch in rows:
        factors = [torch.ones(len(batch.tokens), size, requires_grad=True) for size in sizes]
        loss = objective(model, batch, hidden_states(model, batch, factors[0], factors[1], factors[2]), generator)
        for total, gradient in zip(sums, torch.autograd.grad(loss, factors), strict=True):
            total += gradient.double().t() @ gradient.double()
    return Fisher(*sums)


def least_important(matrix: Tensor, count: int) -> list[int]:
    """The `count` parts whose removal adds least, by F [parts, parts], in the order in which they go."""
    cost, removed = matrix.diagonal().clone(), []
    for _ in range(count):
        part = int(cost.argmin())
        removed.append(part)
        cost += 2 * matrix[part]
        cost[removed] = torch.inf
    return removed


class Inputs:
    """Sums over calibration rows of what the matrices of each layer are multiplied by."""

    def __init__(self, model: ShareBertForMaskedLM, rows: Sequence[Batch]) -> None:
        self.products: dict[str, Tensor] = {}
        """Matrix name → Σ_layers of the covariance of its input, [width, width]."""
        self.means: dict[tuple[int, str], Tensor] = {}
        """(layer, matrix name or `branches`) → mean of its input, or of what the layer adds, [width]."""
        layers = model.config.num_hidden_layers
        second: dict[tuple[int, str], Tensor] = {}
        tokens = 0

        def watch(layer: int, name: str, x: Tensor) -> None:
            flat = x[seen].double()
            self.means[layer, name] = self.means.get((layer, name), 0) + flat.sum(0)
            if name != "branches":
                second[layer, name] = second.get((layer, name), 0) + flat.t() @ flat

        with torch.no_grad():
            for batch in rows:
                seen = batch.visible.bool()
                tokens += int(seen.sum())
                hidden_states(model, batch, watch=watch)
        self.means = {key: total / tokens for key, total in self.means.items()}
        self.second_moments: dict[str, Tensor] = {
            name: torch.stack([second[i, name] for i in range(layers)]).sum(0) / tokens for _, name in second
        }
        """Matrix name (`query` stands for key and value too) → Σ_layers E[x·xᵀ] of its input, [width, width]."""
        for name in ("attention_output", "output"):
            covariances = (
                second[i, name] / tokens - torch.outer(self.means[i, name], self.means[i, name]) for i in range(layers)
            )
            self.products[name] = torch.stack(list(covariances)).sum(0)


def rescaled(covariance: Tensor, matrix: Tensor, kept: Tensor) -> Tensor:
    """Factors s on the kept rows K of a matrix W [in, out], so that Σ_K s_k·x_k·W_k is nearest to Σ_all x_j·W_j.

    Least squares over calibration rows, means left out: with G = C∘(W·Wᵀ), s = 1 + (G_KK + λ)⁻¹·Σ_removed G_Kj.

    Args:
        covariance: C [in, in] of the inputs x.
        matrix: W [in, out].
        kept: numbers of the kept rows, ascending.
    """
    products = covariance * (matrix @ matrix.t())
    removed = torch.ones(len(matrix), dtype=torch.bool)
    removed[kept] = False
    inside = products[kept][:, kept]
    damping = DAMPING * inside.diagonal().mean().clamp(min=1e-30)
    system = inside + damping * torch.eye(len(kept), dtype=inside.dtype)
    return 1 + torch.linalg.solve(system, products[kept][:, removed].sum(1))
