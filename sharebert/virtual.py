"""The virtual embedding matrix M, and the matrices that are cut from it.

Hu et al., "ShareBERT: Embeddings Are Capable of Learning Hidden Layers", AAAI 2024; extended in Neural
Networks 191 (2025) 107794. With V the vocabulary, F the factor size, H the hidden size:

    M = E · W_allᵀ + b_all   [V, H]     E [V, F], W_all [H, F], b_all [H]      (VEPS)
    M = E                    [V, H]                                            (EPS, F = H)

A matrix [in, out] is a block of ⌈in·out/V⌉ columns of M, flattened row by row and cut to its first in·out values.
M itself is never made. The blocks are neighbours: for training, one product makes a slab of M with all of them, and the
matrices are copied out of it. Without gradients each block is a product of its own, and the matrix is a view of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


def blocks(config: ShareBertConfig) -> dict[str, Block]:
    """The block of each matrix, placed from the right edge of the virtual matrix in the authors' order.

    The names are those of `sharing.Weights`, in that order, then `intermediate_2`, `output_2` and so on of further
    feed-forward pairs; `pooler` is last, and furthest to the left.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    h, f = config.square_columns, config.wide_columns

    def block(left: int, width: int, rows: int, columns: int) -> Block:
        return Block(hidden - left, hidden - left + width, rows, columns)

    found = {
        "query": block(h, h, hidden, hidden),
        "key": block(2 * h, h, hidden, hidden),
        "value": block(3 * h, h, hidden, hidden),
        "attention_output": block(h + 2 * f + 3 * h, h, hidden, hidden),
        "intermediate": block(f + 3 * h, f, hidden, inner),
        "output": block(2 * f + 3 * h, f, inner, hidden),
    }
    for number in range(2, config.ffn_pairs + 1):
        before = 4 * h + 2 * (number - 1) * f
        found[f"intermediate_{number}"] = block(before + f, f, hidden, inner)
        found[f"output_{number}"] = block(before + 2 * f, f, inner, hidden)
    found["pooler"] = block(5 * h + 2 * config.ffn_pairs * f, h, hidden, hidden)
    return found


def used_rows(config: ShareBertConfig, *, pooler: bool) -> int:
    """Rows of W_all, the last ones, that make columns of a block; with the pooler's block or without it."""
    cut = blocks(config)
    return config.hidden_size - min(block.first for name, block in cut.items() if pooler or name != "pooler")


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
    return SlabProduct.apply(embedding, projection, bias, tuple(cut), dtype, change)  # type: ignore[no-any-return]


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


class SlabProduct(torch.autograd.Function):
    """VEPS: one product makes a slab of M that holds all blocks, and each matrix is copied out of it.

    The slab's width is aligned for tensor cores, where a block's is not. On CUDA the slab holds all words, and a kernel
    copies. Elsewhere it holds the next `CHUNK_WORDS` words, so that it is copied while it is in a cache.
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
        places = _places(cut, columns)
        e, w, b = embedding.to(dtype), projection[columns].to(dtype), bias[columns].to(dtype)
        if fused := triton_for(embedding):
            return fused.cut_slab(torch.addmm(b, e, w.t()), places)  # type: ignore[no-any-return]
        made = [e.new_empty(len(e), width) for _, width, _, _ in places]
        buffer = e.new_empty(min(CHUNK_WORDS, len(e)), len(w))
        for words in _chunks(e):
            slab = torch.addmm(b, e[words], w.t(), out=buffer[: words.stop - words.start])
            for out, (left, width, _, _) in zip(made, places, strict=True):
                out[words] = slab[:, left : left + width]
        return tuple(_matrix(out, block) for out, block in zip(made, cut, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        embedding, projection = ctx.saved_tensors
        taken = ctx.shared_gradients.take(gradients)
        if ctx.change is not None:
            taken = ctx.change(taken)
        columns = slab_columns(ctx.cut)
        places = _places(ctx.cut, columns)
        e, w = embedding.to(ctx.dtype), projection[columns].to(ctx.dtype)
        sums = accumulation_dtype(ctx.dtype)
        grad_e = torch.zeros(e.shape, dtype=sums, device=e.device)
        grad_w = torch.zeros(projection.shape, dtype=sums, device=e.device)
        grad_b = torch.zeros(len(projection), dtype=sums, device=e.device)
        for words, slab in _gradient_slabs(taken, places, e, len(w)):
            grad_e[words] = product(slab, w)
            accumulate_product(grad_w[columns], slab.t(), e[words])
            grad_b[columns] += column_sums(slab, sums)
        return grad_e.to(embedding.dtype), grad_w.to(projection.dtype), grad_b.to(ctx.bias_dtype), None, None, None


CHUNK_WORDS = 512
"""Words of which a slab holds the columns at a time. For the published sizes these are 2 MB in float32."""


def slab_columns(cut: Sequence[Block]) -> slice:
    """The columns of the virtual matrix that hold all blocks, and up to 7 more so that their number is aligned.

    A width that is a multiple of 8 is a multiple of 16 bytes in every dtype in which products run.
    """
    first, last = min(block.first for block in cut), max(block.last for block in cut)
    return slice(max(0, last - -(-(last - first) // 8) * 8), last)


def _places(cut: Sequence[Block], columns: slice) -> list[tuple[int, int, int, int]]:
    """Of each block in the slab: its first column, how many it has, and the shape of its matrix."""
    return [(block.first - columns.start, block.last - block.first, block.rows, block.columns) for block in cut]


def _chunks(embedding: Tensor) -> list[slice]:
    words = len(embedding)
    return [slice(first, min(first + CHUNK_WORDS, words)) for first in range(0, words, CHUNK_WORDS)]


def _gradient_slabs(
    gradients: Sequence[Tensor | None], places: Sequence[tuple[int, int, int, int]], embedding: Tensor, width: int
) -> Iterator[tuple[slice, Tensor]]:
    """The gradient of the slab, in the dtype of E: (words, their rows of the slab), in one piece or in chunks."""
    if all(gradient is None for gradient in gradients):
        return
    words = len(embedding)
    if fused := triton_for(embedding):
        yield slice(0, words), fused.fill_slab(gradients, places, words, width, embedding.dtype)
        return
    buffer = embedding.new_zeros(min(CHUNK_WORDS, words), width)
    for chunk in _chunks(embedding):
        slab = buffer[: chunk.stop - chunk.start]
        _fill(slab, gradients, places, chunk)
        yield chunk, slab


def _fill(
    slab: Tensor, gradients: Sequence[Tensor | None], places: Sequence[tuple[int, int, int, int]], words: slice
) -> None:
    """Write the gradients of the matrices' values of these words, and 0 behind their ends. What is None is left."""
    for gradient, (left, width, _, _) in zip(gradients, places, strict=True):
        if gradient is None:
            continue
        part = gradient.reshape(-1)[words.start * width : words.stop * width]
        n = len(part) // width
        slab[:n, left : left + width] = part[: n * width].view(n, width)
        if n < len(slab):  # the matrix ends inside row n of the slab
            slab[n:, left : left + width] = 0
            slab[n, left : left + len(part) - n * width] = part[n * width :]


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
