"""The virtual embedding matrix M, and the matrices that are cut from it.

Hu et al., "ShareBERT: Embeddings Are Capable of Learning Hidden Layers", AAAI 2024; extended in Neural
Networks 191 (2025) 107794. With V the vocabulary, F the factor size, H the hidden size:

    M = E · W_allᵀ + b_all   [V, H]     E [V, F], W_all [H, F], b_all [H]      (VEPS)
    M = E                    [V, H]                                            (EPS, F = H)

A matrix [in, out] is a block of ⌈in·out/V⌉ columns of M, flattened row by row and cut to its first in·out values.
M itself is never made. On a CPU each block is one product, which is contiguous, and the matrix is a view of it. On CUDA
one product makes all blocks, which are neighbours, as a slab; `kernels_triton_slab` cuts the matrices out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .config import ShareBertConfig
from .kernels import triton_for
from .precision import accumulate_product, accumulation_dtype, column_sums, compute_dtype, product
from .shared_linear import SharedGradients
from .tracing import is_traced

GradientChange = Callable[[Sequence[Tensor | None]], list[Tensor | None]]
"""Maps the gradients of generated matrices, each [in, out], to those that are carried on to the parameters."""


class Block(NamedTuple):
    """Columns [first, last) of the virtual matrix, and the shape of the matrix that is cut from them."""

    first: int
    last: int
    rows: int
    columns: int


class Blocks(NamedTuple):
    """The block of each matrix, in the order of `sharing.Weights`; the pooler's is last."""

    query: Block
    key: Block
    value: Block
    attention_output: Block
    intermediate: Block
    output: Block
    pooler: Block


def blocks(config: ShareBertConfig) -> Blocks:
    """The blocks of a model, placed from the right edge of the virtual matrix in the authors' order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    h, f = config.square_columns, config.wide_columns

    def block(left: int, width: int, rows: int, columns: int) -> Block:
        return Block(hidden - left, hidden - left + width, rows, columns)

    return Blocks(
        query=block(h, h, hidden, hidden),
        key=block(2 * h, h, hidden, hidden),
        value=block(3 * h, h, hidden, hidden),
        intermediate=block(f + 3 * h, f, hidden, inner),
        output=block(2 * f + 3 * h, f, inner, hidden),
        attention_output=block(h + 2 * f + 3 * h, h, hidden, hidden),
        pooler=block(2 * h + 2 * f + 3 * h, h, hidden, hidden),
    )


def used_rows(config: ShareBertConfig, *, pooler: bool) -> int:
    """Rows of W_all, the last ones, that make columns of a block; with the pooler's block or without it."""
    cut = blocks(config) if pooler else blocks(config)[:-1]
    return config.hidden_size - min(block.first for block in cut)


def generate(
    cut: Sequence[Block],
    embedding: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    change: GradientChange | None = None,
) -> tuple[Tensor, ...]:
    """One matrix for each block of `cut`, in the dtype in which products run.

    Args:
        cut: the blocks.
        embedding: E [V, F].
        projection: W_all [H, F] for VEPS; None for EPS.
        bias: b_all [H] for VEPS; None for EPS.
        change: called in the backward pass; None carries the gradients on as they are.

    Returns:
        Contiguous views, each of its own product (EPS: of its own copy).
    """
    dtype = compute_dtype(embedding)
    plain = is_traced() or not torch.is_grad_enabled()
    if projection is None or bias is None:
        if plain:
            return columns_of(embedding, cut, dtype)
        return _Columns.apply(embedding, tuple(cut), dtype, change)  # type: ignore[no-any-return]
    if plain:
        return products_of(embedding, projection, bias, cut, dtype)
    if triton_for(embedding):
        return _SlabProduct.apply(embedding, projection, bias, tuple(cut), dtype, change)  # type: ignore[no-any-return]
    return _Products.apply(embedding, projection, bias, tuple(cut), dtype, change)  # type: ignore[no-any-return]


def products_of(
    embedding: Tensor, projection: Tensor, bias: Tensor, cut: Sequence[Block], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """VEPS: a product for each block, in plain operations."""
    e, w, b = embedding.to(dtype), projection.to(dtype), bias.to(dtype)
    return tuple(
        _matrix(torch.addmm(b[block.first : block.last], e, w[block.first : block.last].t()), block) for block in cut
    )


def columns_of(matrix: Tensor, cut: Sequence[Block], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Blocks of a matrix [V, H] that is there: a contiguous copy for each, in plain operations."""
    return tuple(_matrix(matrix[:, block.first : block.last].to(dtype, copy=True).contiguous(), block) for block in cut)


def _matrix(columns: Tensor, block: Block) -> Tensor:
    """The matrix [in, out] in the contiguous columns of its block, a view."""
    return columns.view(-1)[: block.rows * block.columns].view(block.rows, block.columns)


class _Products(torch.autograd.Function):
    """VEPS: one autograd node makes all blocks, so that one buffer sums the gradients of E, and one those of W_all.

    With plain autograd, the backward pass would make a zero-filled copy of the weight for each narrowed product, and
    a zero-filled [H, F] for each slice of W_all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embedding: Tensor,
        projection: Tensor,
        bias: Tensor,
        cut: tuple[Block, ...],
        dtype: torch.dtype,
        change: GradientChange | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(embedding, projection)
        ctx.cut, ctx.dtype, ctx.bias_dtype, ctx.change = cut, dtype, bias.dtype, change
        ctx.shared_gradients = SharedGradients(len(cut))
        return products_of(embedding, projection, bias, cut, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        embedding, projection = ctx.saved_tensors
        e, w = embedding.to(ctx.dtype), projection.to(ctx.dtype)
        sums = accumulation_dtype(ctx.dtype)
        grad_e = torch.zeros(e.shape, dtype=sums, device=e.device)
        grad_w = torch.zeros(w.shape, dtype=sums, device=w.device)
        grad_b = torch.zeros(len(w), dtype=sums, device=w.device)
        taken = ctx.shared_gradients.take(gradients)
        if ctx.change is not None:
            taken = ctx.change(taken)
        for block, gradient in zip(ctx.cut, taken, strict=True):
            if gradient is None:
                continue
            columns = slice(block.first, block.last)
            grad_b[columns] += column_sums(_rows(gradient, block)[0], sums)
            whole, rest = _rows(gradient.to(ctx.dtype), block)  # the sum over layers is rounded once, here
            n = len(whole)
            accumulate_product(grad_e[:n], whole, w[columns])
            accumulate_product(grad_w[columns], whole.t(), e[:n])
            if len(rest):  # the weight ends inside this row of the block
                started = slice(block.first, block.first + len(rest))
                grad_e[n] += rest @ w[started]
                grad_w[started] += torch.outer(rest, e[n])
                grad_b[started] += rest
        return grad_e.to(embedding.dtype), grad_w.to(projection.dtype), grad_b.to(ctx.bias_dtype), None, None, None


class _SlabProduct(torch.autograd.Function):
    """VEPS on CUDA: one product makes a slab of M that holds all blocks, and one kernel a matrix of each.

    Three products in all, forward and backward, whose operands are aligned, where `_Products` has three a block.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embedding: Tensor,
        projection: Tensor,
        bias: Tensor,
        cut: tuple[Block, ...],
        dtype: torch.dtype,
        change: GradientChange | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(embedding, projection)
        ctx.cut, ctx.dtype, ctx.bias_dtype, ctx.change = cut, dtype, bias.dtype, change
        ctx.shared_gradients = SharedGradients(len(cut))
        columns = slab_columns(cut)
        e, w, b = embedding.to(dtype), projection[columns].to(dtype), bias[columns].to(dtype)
        fused = triton_for(embedding)
        assert fused is not None
        return fused.cut_slab(torch.addmm(b, e, w.t()), _places(cut, columns))  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        embedding, projection = ctx.saved_tensors
        taken = ctx.shared_gradients.take(gradients)
        if ctx.change is not None:
            taken = ctx.change(taken)
        if all(gradient is None for gradient in taken):
            return (None,) * 6
        fused = triton_for(embedding)
        assert fused is not None
        columns, sums = slab_columns(ctx.cut), accumulation_dtype(ctx.dtype)
        width = columns.stop - columns.start
        # The sums over layers are rounded once, here.
        slab = fused.fill_slab(taken, _places(ctx.cut, columns), len(embedding), width, ctx.dtype)
        grad_w = torch.zeros_like(projection)
        grad_w[columns] = product(slab.t(), embedding.to(ctx.dtype))
        grad_b = torch.zeros(len(projection), dtype=ctx.bias_dtype, device=projection.device)
        grad_b[columns] = column_sums(slab, sums)
        grad_e = product(slab, projection[columns].to(ctx.dtype)).to(embedding.dtype)
        return grad_e, grad_w, grad_b, None, None, None


def slab_columns(cut: Sequence[Block]) -> slice:
    """The columns of the virtual matrix that hold all blocks, and up to 7 more so that their number is aligned.

    A width that is a multiple of 8 is a multiple of 16 bytes in every dtype in which products run.
    """
    first, last = min(block.first for block in cut), max(block.last for block in cut)
    return slice(max(0, last - -(-(last - first) // 8) * 8), last)


def _places(cut: Sequence[Block], columns: slice) -> list[tuple[int, int, int, int]]:
    return [(block.first - columns.start, block.last - block.first, block.rows, block.columns) for block in cut]


class _Columns(torch.autograd.Function):
    """EPS: blocks are columns of E. A row of E has H values, so to make a block contiguous takes one copy."""

    @staticmethod
    def forward(
        ctx: Any, embedding: Tensor, cut: tuple[Block, ...], dtype: torch.dtype, change: GradientChange | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.cut, ctx.change, ctx.device = cut, change, embedding.device
        ctx.shape, ctx.embedding_dtype = embedding.shape, embedding.dtype
        ctx.shared_gradients = SharedGradients(len(cut))
        return columns_of(embedding, cut, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        taken = ctx.shared_gradients.take(gradients)
        if ctx.change is not None:
            taken = ctx.change(taken)
        grad_e = torch.zeros(ctx.shape, dtype=ctx.embedding_dtype, device=ctx.device)
        for block, gradient in zip(ctx.cut, taken, strict=True):
            if gradient is not None:
                whole, rest = _rows(gradient, block)
                grad_e[: len(whole), block.first : block.last] = whole
                grad_e[len(whole) : len(whole) + 1, block.first : block.first + len(rest)] = rest
        return grad_e, None, None, None


def _rows(gradient: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """The gradient of a weight as n whole rows of its block [n, width], and the rest: the start of the next row."""
    flat = gradient.reshape(-1)
    width = block.last - block.first
    n = len(flat) // width
    return flat[: n * width].view(n, width), flat[n * width :]
