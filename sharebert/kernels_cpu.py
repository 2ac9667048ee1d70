"""Dropout, and attention with dropout on its probabilities, for CPUs.

On a CPU, memory that is touched for the first time costs more than the arithmetic. So temporaries are few and small:
masks take one byte an element, and attention goes through the batch row by row, on strided views, without a copy of
queries, keys, values or their gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def kept_mask(shape: torch.Size, dropout: float) -> tuple[Tensor, float]:
    """Which elements to keep, uint8 of `shape`, and 1 / the probability that an element is kept.

    `dropout` must be above 0 and is rounded to 16 bits, because four elements share one 64-bit random number; this
    takes a sixth of the time of one number for each. uint8, because torch casts it to float32 in an eighth of the
    time that it needs for booleans.
    """
    drops = max(1, min(2**16 - 1, round(dropout * 2**16)))
    random = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = random.view(torch.int16)[: shape.numel()].view(shape)
    kept = torch.ge(numbers, drops - 2**15, out=torch.empty(shape, dtype=torch.uint8))
    return kept, 2**16 / (2**16 - drops)


class Dropout(torch.autograd.Function):
    """(x, dropout) → the kept values of x, scaled, and 0 for the dropped ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: float) -> Tensor:
        kept, ctx.scale = kept_mask(x.shape, dropout)
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None


class DropoutAttention(torch.autograd.Function):
    """dropout(softmax(query·keyᵀ·scale))·value; all [B, heads, T, d], in memory laid out as [B, T, heads, d].

    `mask`: booleans that broadcast to [B, heads, T, T], true where a query sees a key, or None. `softmax_dtype`: the
    dtype in which probabilities are computed and kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        dropout: float,
        softmax_dtype: torch.dtype,
    ) -> Tensor:
        shape = torch.Size((*query.shape[:3], key.shape[2]))
        kept, rescale = kept_mask(shape, dropout)
        probabilities = query.new_empty(shape, dtype=softmax_dtype)
        output = _like(query)
        hidden = None if mask is None else (~mask).expand(len(query), *mask.shape[1:])
        for row in range(len(query)):
            scores = query.new_empty(shape[1:]).baddbmm_(query[row], key[row].mT, beta=0, alpha=scale)
            if hidden is not None:
                scores.masked_fill_(hidden[row], -torch.inf)
            torch.softmax(scores, -1, dtype=softmax_dtype, out=probabilities[row])
            left = (probabilities[row] * kept[row]).to(value.dtype)
            output[row].baddbmm_(left, value[row], beta=0, alpha=rescale)
        ctx.save_for_backward(query, key, value, probabilities, kept)
        ctx.scale, ctx.rescale = scale, rescale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities, kept = ctx.saved_tensors
        grad_query, grad_key, grad_value = _like(query), _like(key), _like(value)
        for row in range(len(query)):
            left = (probabilities[row] * kept[row]).to(value.dtype)
            grad_value[row].baddbmm_(left.mT, gradient[row], beta=0, alpha=ctx.rescale)
            of_left = value.new_empty(left.shape).baddbmm_(gradient[row], value[row].mT, beta=0, alpha=ctx.rescale)
            weighted = probabilities[row] * of_left.mul_(kept[row])
            of_scores = weighted.addcmul_(probabilities[row], weighted.sum(-1, keepdim=True), value=-1)
            of_scores = of_scores.to(query.dtype)
            grad_query[row].baddbmm_(of_scores, key[row], beta=0, alpha=ctx.scale)
            grad_key[row].baddbmm_(of_scores.mT, query[row], beta=0, alpha=ctx.scale)
        return grad_query, grad_key, grad_value, None, None, None, None


def _like(x: Tensor) -> Tensor:
    """An uninitialised tensor of the shape of x [B, heads, T, d], in memory laid out as [B, T, heads, d]."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
