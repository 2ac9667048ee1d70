"""Bias and exact GELU as one Triton kernel forward and one backward.

The backward kernel sums the bias gradient while the values are in registers, which saves one read of [rows, width].
The sum of the product and the bias is never stored. The GELU of Liger-Kernel and of cuBLAS is the tanh
approximation; the paper's model uses the exact GELU.
"""

# Triton reads the annotations of a kernel as its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels_triton_norm import as_rows, programs_for

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton (pip install triton)") from error

ROWS, COLUMNS, WARPS = 4, 512, 4
"""The tile of one program (16 values a thread), and its warps."""

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_TWO_PI = tl.constexpr(2.5066282746310002)


@triton.jit
def bias_gelu_forward(
    x,
    bias,
    y,
    x_stride,
    rows,
    width,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program computes one tile of rows and columns."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < width)
    z = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(SUMS)
    z += tl.load(bias + column, mask=column < width, other=0.0).to(SUMS)
    out = 0.5 * z * (1.0 + tl.erf(z * ROOT_HALF))
    tl.store(y + row * width + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def bias_gelu_backward(
    grad_y,
    x,
    bias,
    grad_x,
    grad_bias,
    grad_stride,
    x_stride,
    rows,
    width,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program keeps its columns, strides over the tiles of rows, and writes its part of the bias gradient."""
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    known = column < width
    b = tl.load(bias + column, mask=known, other=0.0).to(SUMS)
    total = tl.zeros((1, COLUMNS), SUMS)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & known
        z = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(SUMS) + b
        dy = tl.load(grad_y + row * grad_stride + column, mask=inside, other=0.0).to(SUMS)
        density = tl.exp(-0.5 * z * z) / ROOT_TWO_PI
        dx = dy * (0.5 * (1.0 + tl.erf(z * ROOT_HALF)) + z * density)
        tl.store(grad_x + row * width + column, dx.to(grad_x.dtype.element_ty), mask=inside)
        total += tl.sum(dx, 0)[None, :]
    tl.store(grad_bias + tl.program_id(0) * width + column, total, mask=known)


class FusedBiasGelu(torch.autograd.Function):
    """(x [..., width], bias [width]) → gelu(x + bias), in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        flat = as_rows(x)
        rows, width = flat.shape
        y = flat.new_empty(rows, width)
        ctx.options = {
            "SUMS": tl.float64 if x.dtype == torch.float64 else tl.float32,
            "ROWS": ROWS,
            "COLUMNS": COLUMNS,
            "num_warps": WARPS,
        }
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
        if rows:
            bias_gelu_forward[grid](flat, bias, y, flat.stride(0), rows, width, **ctx.options)
        ctx.save_for_backward(flat, bias)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        dy = as_rows(grad_y)
        rows, width = x.shape
        across = triton.cdiv(width, COLUMNS)
        down = max(1, min(triton.cdiv(rows, ROWS), triton.cdiv(programs_for(x.device), across)))
        grad_x = x.new_empty(rows, width)
        grad_bias = x.new_empty(down, width, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        strides = (dy.stride(0), x.stride(0))
        bias_gelu_backward[(down, across)](dy, x, bias, grad_x, grad_bias, *strides, rows, width, **ctx.options)
        return grad_x.view(grad_y.shape), grad_bias.sum(0).to(bias.dtype)
