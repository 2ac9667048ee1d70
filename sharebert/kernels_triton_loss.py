"""Cross-entropy of a chunk of logits, with the gradient written over the logits, as one Triton kernel.

It reads a row of logits twice and writes it once. Unfused, the softmax, its gradient and the sums in between move
the row through memory about ten times, in float32. Liger-Kernel's fused linear cross-entropy works in the same way,
but has no weight for each row, and rounds gradients to half precision before the loss scale is applied.
"""

# Triton reads the annotations of a kernel as its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton (pip install triton)") from error

COLUMNS, WARPS = 4096, 8
"""Logits of a row that a program holds at a time (16 a thread), and its warps."""


@triton.jit
def _biased(logits, bias, column, width, HAS_BIAS: tl.constexpr, SUMS: tl.constexpr):
    """Logits of a row at `column`, with the bias; -inf past the width."""
    x = tl.load(logits + column, mask=column < width, other=float("-inf")).to(SUMS)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=column < width, other=0.0).to(SUMS)
    return x


@triton.jit
def cross_entropy_rows(
    logits,
    bias,
    labels,
    loss_weights,
    losses,
    hits,
    width,
    HAS_BIAS: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    SUMS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program computes one row: weight · loss, weight · [the first highest logit is the label's], and, over the
    logits, the gradient of weight · loss."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    weight = tl.load(loss_weights + row).to(SUMS)
    start = logits + row * width
    highest = tl.full((), float("-inf"), SUMS)
    best = tl.full((), 0, tl.int32)
    total = tl.zeros((), SUMS)
    of_label = tl.load(start + label).to(SUMS)
    if HAS_BIAS:
        of_label += tl.load(bias + label).to(SUMS)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = _biased(start, bias, column, width, HAS_BIAS, SUMS)
        here = tl.max(x, 0)
        where = tl.min(tl.where(x == here, column, width), 0)
        best = tl.where(here > highest, where, best)
        above = tl.maximum(highest, here)
        total = total * tl.exp(highest - above) + tl.sum(tl.exp(x - above), 0)
        highest = above
    log_z = highest + tl.log(total)
    tl.store(losses + row, (log_z - of_label) * weight)
    tl.store(hits + row, tl.where(best == label, weight, 0.0))
    if WITH_GRADIENT:
        for first in range(0, width, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            x = _biased(start, bias, column, width, HAS_BIAS, SUMS)
            gradient = (tl.exp(x - log_z) - tl.where(column == label, 1.0, 0.0)) * weight
            tl.store(start + column, gradient.to(logits.dtype.element_ty), mask=column < width)


def chunk_cross_entropy(
    logits: Tensor, bias: Tensor | None, labels: Tensor, loss_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.chunk_cross_entropy`; the gradient overwrites the logits, which must be contiguous."""
    rows, width = logits.shape
    double = logits.dtype == torch.float64
    losses, hits = logits.new_empty(2, rows, dtype=torch.float64 if double else torch.float32).unbind()
    cross_entropy_rows[(rows,)](
        logits,
        bias,
        labels,
        loss_weights,
        losses,
        hits,
        width,
        HAS_BIAS=bias is not None,
        WITH_GRADIENT=with_gradient,
        SUMS=tl.float64 if double else tl.float32,
        COLUMNS=min(COLUMNS, triton.next_power_of_2(width)),
        num_warps=WARPS,
    )
    return losses.sum(), hits.sum(), logits
