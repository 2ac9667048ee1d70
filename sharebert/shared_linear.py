"""x·W + b where several layers share W: the layers add their gradients of W into one buffer.

Autograd would give each layer's gradient of W memory of its own, and add these up afterwards: two more passes over
the memory of W for every layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import accumulate_product, column_sums, compute_dtype, product
from .tracing import is_traced


class SharedGradients:
    """Sums of the gradients of matrices that one autograd node made and that several layers use.

    The sums belong to one backward pass. A backward pass that asks only for other gradients never reaches the node
    that takes the sums; what it left here is dropped when the next pass begins.
    """

    def __init__(self, count: int) -> None:
        self._sums: list[Tensor | None] = [None] * count
        self._backward_pass: int | None = None

    def add_product(self, index: int, a: Tensor, b: Tensor) -> None:
        """Add a [in, m] · b [m, out] to the gradient of matrix `index` [in, out], in float32 at least."""
        self._drop_other_pass()
        total = self._sums[index]
        if total is None:
            self._sums[index] = product(a, b)
        else:
            accumulate_product(total, a, b)

    def take(self, from_autograd: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """The whole gradient of each matrix: the sum kept here plus the gradient that autograd gives."""
        self._drop_other_pass()
        sums, self._sums = self._sums, [None] * len(self._sums)
        return [
            other if ours is None else ours if other is None else ours.add_(other)
            for ours, other in zip(sums, from_autograd, strict=True)
        ]

    def _drop_other_pass(self) -> None:
        this = torch._C._current_graph_task_id()
        if this != self._backward_pass:
            self._sums, self._backward_pass = [None] * len(self._sums), this


class LowRank(NamedTuple):
    """A matrix [in, out] as the product a·b, which is never made: x·a·b is two small products."""

    a: Tensor
    """[in, rank]."""
    b: Tensor
    """[rank, out]."""


def narrowed(x: Tensor, weight: Tensor | LowRank) -> tuple[Tensor, Tensor]:
    """What is multiplied by what, so that the result is x [..., in] · weight [in, out]."""
    if not isinstance(weight, LowRank):
        return x, weight
    return matmul(x, weight.a).view(*x.shape[:-1], weight.a.shape[1]), weight.b


def written_out(weight: Tensor | LowRank) -> Tensor:
    """The matrix [in, out] itself."""
    return weight.a @ weight.b if isinstance(weight, LowRank) else weight


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] · weight [in, out] as [rows, out], without a bias; else as `linear`."""
    dtype = compute_dtype(x)
    flat, weight = x.flatten(0, -2).to(dtype), weight.to(dtype)
    if is_traced() or not torch.is_grad_enabled():
        return flat @ weight
    return _Linear.apply(None, flat, weight)  # type: ignore[no-any-return]


def linear(x: Tensor, weight: Tensor | LowRank, bias: Tensor) -> Tensor:
    """x [..., in] · weight [in, out] + bias [out].

    It is one `addmm` on views: neither the weight nor its gradient is copied or transposed. If `virtual` made the
    weight, the gradients of all its uses are summed by the products that make them.
    """
    x, weight = narrowed(x, weight)
    dtype = compute_dtype(x)
    flat, weight = x.flatten(0, -2).to(dtype), weight.to(dtype)
    if is_traced() or not torch.is_grad_enabled():
        y = torch.addmm(bias.to(dtype), flat, weight)
    else:
        y = _Linear.apply(bias, flat, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


class _Linear(torch.autograd.Function):
    """If the node that made the weight has `shared_gradients`, adds to them and gives autograd no gradient for it."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.shared, ctx.index = getattr(weight.grad_fn, "shared_gradients", None), weight.output_nr
        return x @ weight if bias is None else torch.addmm(bias.to(x.dtype), x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_bias, needs_x, needs_weight = ctx.needs_input_grad
        grad_x = gradient @ weight.t() if needs_x else None
        grad_bias = column_sums(gradient, ctx.bias_dtype) if needs_bias else None
        if not needs_weight:
            return grad_bias, grad_x, None
        if ctx.shared is None:
            return grad_bias, grad_x, x.t() @ gradient
        ctx.shared.add_product(ctx.index, x.t(), gradient)
        return grad_bias, grad_x, None
