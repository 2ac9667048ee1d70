"""Matrices cut out of a slab of the virtual matrix, and their gradients put back in, as one Triton kernel each.

A block of the virtual matrix is 138 or 275 columns in the published sizes. Rows of that many 16-bit values do not start
at multiples of 16 bytes, for which products on tensor cores are much slower. The blocks are neighbours, so one product
makes them all, in a slab whose width is a multiple of 8; these kernels move values between the slab and the matrices.
Both copy values and do no arithmetic. One launch moves one matrix.
"""

# Triton reads the annotations of a kernel as its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the fused kernels need Triton (pip install triton)") from error

Place = tuple[int, int, int, int]
"""Where a matrix lies in a slab: its first column, how many columns it has, and its shape."""


TILE, WARPS = 2048, 4
"""Values that one program moves, and its warps."""


@triton.jit
def cut_kernel(slab, out, slab_width, left, columns, count, TILE: tl.constexpr):
    """out[i] is value i of the `columns` columns of the slab from `left` on, read row by row, for i < count."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = i // columns
    value = tl.load(slab + row * slab_width + left + (i - row * columns), mask=i < count)
    tl.store(out + i, value, mask=i < count)


@triton.jit
def fill_kernel(gradient, slab, slab_width, left, columns, count, total, TILE: tl.constexpr):
    """Value i of the `columns` columns of the slab from `left` on is gradient[i], and 0 for count <= i < total."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row = i // columns
    value = tl.load(gradient + i, mask=i < count, other=0.0).to(slab.dtype.element_ty)
    tl.store(slab + row * slab_width + left + (i - row * columns), value, mask=i < total)


def cut_slab(slab: Tensor, places: Sequence[Place]) -> tuple[Tensor, ...]:
    """A contiguous matrix [rows, columns] for each place of a contiguous slab [V, width]."""
    matrices = []
    for left, width, rows, columns in places:
        out = slab.new_empty(rows, columns)
        grid = (triton.cdiv(out.numel(), TILE),)
        cut_kernel[grid](slab, out, slab.shape[1], left, width, out.numel(), TILE=TILE, num_warps=WARPS)
        matrices.append(out)
    return tuple(matrices)


def fill_slab(
    gradients: Sequence[Tensor | None], places: Sequence[Place], words: int, width: int, dtype: torch.dtype
) -> Tensor:
    """The gradient [words, width] of a slab, from those of its matrices. It is 0 where no matrix lies.

    Args:
        gradients: [rows, columns] for each place, in any dtype; None for 0.
        places: of the matrices, from the right edge of the slab to the left without a gap.
        words: V.
        width: of the slab.
        dtype: of the result, in which the products with it run.
    """
    device = next(gradient.device for gradient in gradients if gradient is not None)
    slab = torch.empty(words, width, dtype=dtype, device=device)
    padding = min(left for left, *_ in places)
    filled = [(left, columns, gradient) for (left, columns, _, _), gradient in zip(places, gradients, strict=True)]
    for left, columns, gradient in [*filled, (0, padding, None)] if padding else filled:
        values, count = (slab, 0) if gradient is None else (gradient.contiguous(), gradient.numel())
        total = words * columns
        grid = (triton.cdiv(total, TILE),)
        fill_kernel[grid](values, slab, width, left, columns, count, total, TILE=TILE, num_warps=WARPS)
    return slab
