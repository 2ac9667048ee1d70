"""What an error of the factors costs, in closed form.

Let δ be the error of row v of E, and δ·W_allᵀ the error that it makes in row v of the virtual matrix. Element c of that
row, in the block of matrix b, is an element of a weight [in, out] whose input channel is i = ⌊(v·h_b + c) / out⌋, so
its squared error counts a_b(i) = Σ_layers E[x_i²] times. Summed over all elements:

    cost(δ) = δ·H_v·δᵀ,  H_v = Σ_b Σ_c a_b(i(v, c)) · w_c·w_cᵀ  +  n_v · G

with w_c the row of W_all for column c, n_v how often word v occurs, and G = JᵀJ what an error of a looked-up factor
costs on its way through the two factor norms and factor_linear, their means left out. A tied head adds n_v·E[t·tᵀ],
with t the vectors that it multiplies by E. An error of row c of W_all costs the same with E in place of W_all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sharebert.config import ShareBertConfig
from sharebert.heads import ShareBertForMaskedLM
from sharebert.sharing import OneGeneratedSet
from sharebert.virtual import Block, blocks


class Statistics(NamedTuple):
    """What calibration rows say."""

    squares: dict[str, Tensor]
    """Matrix → Σ_layers E[x_i²] of its input, [in]."""
    counts: Tensor
    """How often each word occurs per token, [V]."""
    heads: Tensor | None
    """E[t·tᵀ] [F, F] of a tied head's vectors; None for another head."""


class _Inputs(TorchDispatchMode):
    """Adds up the squares of what given matrices are multiplied by."""

    def __init__(self, matrices: dict[str, Tensor]) -> None:
        super().__init__()
        self._names = {matrix.data_ptr(): name for name, matrix in matrices.items()}
        self.squares = {name: torch.zeros(len(matrix), dtype=torch.float64) for name, matrix in matrices.items()}
        self.real: Tensor | None = None
        """[B·T], False at padding; None where there is none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.addmm.default and args[2].data_ptr() in self._names:
            given = args[1] if self.real is None else args[1][self.real]
            self.squares[self._names[args[2].data_ptr()]] += (given.double() ** 2).sum(0)
        return func(*args, **(kwargs or {}))


def collect(model: ShareBertForMaskedLM, tokens: Tensor, real: Tensor, rows_at_once: int = 64) -> Statistics:
    """Run rows through the encoder, and watch what its matrices are multiplied by. Padding does not count.

    Args:
        model: in evaluation mode, on the CPU.
        tokens: [rows, length].
        real: [rows, length], False at padding.
        rows_at_once: rows of a batch.
    """
    encoder, config, head = model.sharebert, model.config, model.mlm_head
    products = torch.zeros(config.factor_size, config.factor_size, dtype=torch.float64)
    with torch.no_grad():
        made = OneGeneratedSet(config)(encoder, pooler=False)
        encoder.sharing = lambda *_: made  # the same tensors in every batch, so that they can be told apart
        try:
            with _Inputs(made.of_layer(0)._asdict()) as inputs:
                for some, mask in zip(tokens.split(rows_at_once), real.split(rows_at_once), strict=True):
                    inputs.real = None if mask.all() else mask.flatten()
                    hidden = encoder(some, None if mask.all() else mask, pool=False).hidden
                    if head is not None and head.tied:
                        t = head.norm(F.gelu(head.dense(hidden[mask]))).double()
                        products += t.t() @ t
        finally:
            encoder.sharing = OneGeneratedSet(config)
    words = tokens[real]
    squares = {name: (total / len(words)).float() for name, total in inputs.squares.items()}
    counts = torch.bincount(words, minlength=config.vocab_size).float() / len(words)
    tied = head is not None and head.tied
    return Statistics(squares, counts, (products / len(words)).float() if tied else None)


def of_embedding(model: ShareBertForMaskedLM, statistics: Statistics, projection: Tensor) -> Callable[[slice], Tensor]:
    """The Hessians [n, F, F] of some rows of E; `projection` is W_all [H, F] as it will be used."""
    outer = (projection[:, :, None] * projection[:, None, :]).flatten(1)
    factor = projection.shape[1]
    encoder = model.sharebert
    with torch.no_grad():
        e = encoder.word_embeddings.weight
        hidden = encoder.factor_linear(encoder.pre_factor_norm(e))
        spread = e.std(1, correction=0).clamp(min=1e-6) * hidden.std(1, correction=0).clamp(min=1e-6)
        path = encoder.pos_factor_norm.weight[:, None] * encoder.factor_linear.weight * encoder.pre_factor_norm.weight
        through = path.t() @ path

    def hessians(rows: slice) -> Tensor:
        blocks_part = (element_costs(model.config, statistics, rows) @ outer).view(-1, factor, factor)
        lookups = statistics.counts[rows] / spread[rows] ** 2
        found = blocks_part + lookups[:, None, None] * through
        if statistics.heads is not None:
            found += statistics.counts[rows, None, None] * statistics.heads
        return found

    return hessians


def of_projection(model: ShareBertForMaskedLM, statistics: Statistics, embedding: Tensor) -> Callable[[slice], Tensor]:
    """The Hessians [n, F, F] of some rows of W_all; `embedding` is E [V, F] as it will be used."""
    costs = element_costs(model.config, statistics, slice(None))

    def hessians(rows: slice) -> Tensor:
        return torch.einsum("vc,vf,vg->cfg", costs[:, rows], embedding, embedding)

    return hessians


def element_costs(config: ShareBertConfig, statistics: Statistics, rows: slice) -> Tensor:
    """a_b(i) of every element of some rows of the virtual matrix [rows, H]; 0 where no matrix is cut."""
    words = torch.arange(config.vocab_size)[rows]
    costs = torch.zeros(len(words), config.hidden_size)
    for name, block in blocks(config).items():
        if name in statistics.squares:
            costs[:, block.first : block.last] = _of_block(block, words, statistics.squares[name])
    return costs


def _of_block(block: Block, words: Tensor, squares: Tensor) -> Tensor:
    width = block.last - block.first
    places = words[:, None] * width + torch.arange(width)
    channel = places // block.columns
    return torch.where(channel < block.rows, squares[channel.clamp(max=block.rows - 1)], 0.0)
