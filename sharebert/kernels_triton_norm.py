"""Dropout, residual addition and LayerNorm as one Triton kernel forward and one backward.

Unfused, they move the residual stream through memory five times and keep a dropout mask of one byte an element. Here
a program holds a whole row in registers. The mask is not kept: the backward pass makes it again, as a counter-based
random number of (seed, row, column). Liger-Kernel's LayerNorm includes neither the addition nor dropout, so with it
both would go through memory again.
"""

# Triton reads the annotations of a kernel as its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton (pip install triton)") from error

ROUNDS = tl.constexpr(7)
"""Rounds of Philox-4x32: 7 is the fewest that pass BigCrush (Salmon et al., "Parallel random numbers: as easy as 1,
2, 3")."""

PROGRAMS_PER_PROCESSOR = 4
"""Programs for each multiprocessor in a backward pass; each sums the parameters' gradients over its own rows."""


@triton.jit
def _kept(seed, row, threshold, BLOCK: tl.constexpr):
    """Which of the BLOCK columns of a row dropout keeps. Four columns use the four words of one random number."""
    group = tl.arange(0, BLOCK // 4)
    none = group * 0
    a, b, c, d = tl.philox(tl.load(seed), group, none + row.to(tl.int32), none, none, ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))
    return words.to(tl.uint32) >= threshold.to(tl.uint32)


@triton.jit
def add_dropout_norm_forward(
    stream,
    branch,
    weight,
    bias,
    seed,
    summed,
    normed,
    means,
    deviations,
    stream_stride,
    branch_stride,
    width,
    eps,
    threshold,
    keep_scale,
    HAS_BRANCH: tl.constexpr,
    DROPOUT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program computes one row. `deviations` receives 1/√(variance + eps)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(stream + row * stream_stride + column, mask=inside, other=0.0).to(SUMS)
    if HAS_BRANCH:
        added = tl.load(branch + row * branch_stride + column, mask=inside, other=0.0).to(SUMS)
        if DROPOUT:
            added = tl.where(_kept(seed, row, threshold, BLOCK), added * keep_scale, 0.0)
        total = (x + added).to(summed.dtype.element_ty)
        tl.store(summed + row * width + column, total, mask=inside)
        x = total.to(SUMS)  # the statistics are those of the rounded sum, which the backward pass reads
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    deviation = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(SUMS)
    b = tl.load(bias + column, mask=inside, other=0.0).to(SUMS)
    y = centred * deviation * w + b
    tl.store(normed + row * width + column, y.to(normed.dtype.element_ty), mask=inside)
    tl.store(means + row, mean)
    tl.store(deviations + row, deviation)


@triton.jit
def add_dropout_norm_backward(
    grad_normed,
    grad_summed,
    summed,
    weight,
    seed,
    means,
    deviations,
    grad_stream,
    grad_branch,
    grad_weight,
    grad_bias,
    summed_stride,
    rows,
    width,
    threshold,
    keep_scale,
    HAS_GRAD_SUMMED: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    DROPOUT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program strides over the rows, and writes its part of the parameters' gradients, [programs, width]."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0).to(SUMS)
    sum_weight = tl.zeros((BLOCK,), SUMS)
    sum_bias = tl.zeros((BLOCK,), SUMS)
    for one in range(program, rows, tl.num_programs(0)):
        row = tl.cast(one, tl.int64)
        at = row * width + column
        x = tl.load(summed + row * summed_stride + column, mask=inside, other=0.0).to(SUMS)
        dy = tl.load(grad_normed + at, mask=inside, other=0.0).to(SUMS)
        deviation = tl.load(deviations + row)
        unit = tl.where(inside, (x - tl.load(means + row)) * deviation, 0.0)
        sum_weight += dy * unit
        sum_bias += dy
        dy *= w
        along = tl.sum(dy * unit, 0) / width
        dx = (dy - tl.sum(dy, 0) / width - unit * along) * deviation
        if HAS_GRAD_SUMMED:
            dx += tl.load(grad_summed + at, mask=inside, other=0.0).to(SUMS)
        tl.store(grad_stream + at, dx.to(grad_stream.dtype.element_ty), mask=inside)
        if HAS_BRANCH:
            if DROPOUT:
                dx = tl.where(_kept(seed, row, threshold, BLOCK), dx * keep_scale, 0.0)
            tl.store(grad_branch + at, dx.to(grad_branch.dtype.element_ty), mask=inside)
    tl.store(grad_weight + program * width + column, sum_weight, mask=inside)
    tl.store(grad_bias + program * width + column, sum_bias, mask=inside)


def block_and_warps(width: int) -> tuple[int, int]:
    """Columns that a program holds (a power of two), and its warps: 16 columns a thread, up to 16 warps."""
    block = max(16, triton.next_power_of_2(width))
    return block, min(16, max(1, block // 512))


def programs_for(device: torch.device) -> int:
    """Number of programs in a backward pass that sums over rows."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return PROGRAMS_PER_PROCESSOR * processors


def as_rows(x: Tensor) -> Tensor:
    """[..., width] → [rows, width] with adjacent columns; a view if the strides allow it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class FusedAddDropoutNorm(torch.autograd.Function):
    """(stream, branch or None) → (stream + dropout(branch), its LayerNorm); without a branch the first is None."""

    @staticmethod
    def forward(
        ctx: Any,
        stream: Tensor,
        branch: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor]:
        ctx.set_materialize_grads(False)
        x, b = as_rows(stream), None if branch is None else as_rows(branch)
        rows, width = x.shape
        block, warps = block_and_warps(width)
        double = x.dtype == torch.float64
        sums = torch.float64 if double else torch.float32
        # Drawn on the device: the host does not wait, and a CUDA graph draws a new seed at each replay.
        seed = torch.randint(2**62, (1,), device=x.device) if b is not None and dropout else None
        total = x if b is None else x.new_empty(rows, width, dtype=torch.promote_types(x.dtype, b.dtype))
        normed = x.new_empty(rows, width, dtype=dtype)
        means, deviations = x.new_empty(2, rows, dtype=sums).unbind()
        ctx.options = {
            "threshold": min(2**32 - 1, round(dropout * 2**32)),
            "keep_scale": 1 / (1 - dropout),
            "HAS_BRANCH": b is not None,
            "DROPOUT": seed is not None,
            "SUMS": tl.float64 if double else tl.float32,
            "BLOCK": block,
            "num_warps": warps,
        }
        branch_stride = 0 if b is None else b.stride(0)
        given = (x, b, weight, bias, seed, total, normed, means, deviations)
        if rows:
            add_dropout_norm_forward[(rows,)](*given, x.stride(0), branch_stride, width, eps, **ctx.options)
        ctx.save_for_backward(total, weight, seed, means, deviations)
        ctx.shape, ctx.dtypes = stream.shape, (stream.dtype, None if branch is None else branch.dtype, bias.dtype)
        return None if b is None else total.view(stream.shape), normed.view(stream.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_summed: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, seed, means, deviations = ctx.saved_tensors
        stream_dtype, branch_dtype, bias_dtype = ctx.dtypes
        rows, width = total.shape
        if grad_normed is None:
            grad_normed = torch.zeros(ctx.shape, dtype=total.dtype, device=total.device)
        dy = grad_normed.reshape(rows, width).contiguous()
        ds = None if grad_summed is None else grad_summed.reshape(rows, width).contiguous()
        grad_stream = total.new_empty(rows, width, dtype=stream_dtype)
        grad_branch = None if branch_dtype is None else total.new_empty(rows, width, dtype=branch_dtype)
        programs = max(1, min(rows, programs_for(total.device)))
        grad_weight, grad_bias = means.new_empty(2, programs, width).unbind()
        given = (dy, ds, total, weight, seed, means, deviations, grad_stream, grad_branch, grad_weight, grad_bias)
        add_dropout_norm_backward[(programs,)](
            *given, total.stride(0), rows, width, HAS_GRAD_SUMMED=ds is not None, **ctx.options
        )
        return (
            grad_stream.view(ctx.shape),
            None if grad_branch is None else grad_branch.view(ctx.shape),
            grad_weight.sum(0).to(weight.dtype),
            grad_bias.sum(0).to(bias_dtype),
            None,
            None,
            None,
        )
