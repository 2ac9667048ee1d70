"""x·W + b where several layers share W: the layers add their gradients of W into one buffer.

Autograd would give each layer's gradient of W memory of its own, and add these up afterwards: two more passes over
the memory of W for every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    return _Linears.apply(flat, weight, None)[0]  # type: ignore[no-any-return]


def linear(x: Tensor, weight: Tensor | LowRank, bias: Tensor) -> Tensor:
    """x [..., in] · weight [in, out] + bias [out].

    It is one `addmm` on views: neither the weight nor its gradient is copied or transposed. If `virtual` made the
    weight, the gradients of all its uses are summed by the products that make them.
    """
    return linears(x, (weight,), (bias,))[0]


def linears(x: Tensor, weights: Sequence[Tensor | LowRank], biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`linear` of one x with several weights. Their gradients of x are added up by the products that make them."""
    if any(isinstance(weight, LowRank) for weight in weights):
        pairs = [narrowed(x, weight) for weight in weights]
        return tuple(_linears(x, (weight,), (bias,))[0] for (x, weight), bias in zip(pairs, biases, strict=True))
    return _linears(x, weights, biases)  # type: ignore[arg-type]


def _linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, ...]:
    dtype = compute_dtype(x)
    flat, weights = x.flatten(0, -2).to(dtype), [weight.to(dtype) for weight in weights]
    if is_traced() or not torch.is_grad_enabled():
        made = [torch.addmm(bias.to(dtype), flat, weight) for weight, bias in zip(weights, biases, strict=True)]
    else:
        made = _Linears.apply(flat, *weights, *biases)
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in made)


class _Linears(torch.autograd.Function):
    """x [rows, in], n weights and as many biases (or None) → n outputs [rows, out].

    Where the node that made a weight has `shared_gradients`, adds to them and gives autograd no gradient for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights_and_biases: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        count = len(weights_and_biases) // 2
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        ctx.save_for_backward(x, *weights)
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        ctx.shared = [getattr(weight.grad_fn, "shared_gradients", None) for weight in weights]
        ctx.indices = [weight.output_nr for weight in weights]
        return tuple(
            x @ weight if bias is None else torch.addmm(bias.to(x.dtype), x, weight)
            for weight, bias in zip(weights, biases, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        count = len(weights)
        needs_weight, needs_bias = ctx.needs_input_grad[1 : count + 1], ctx.needs_input_grad[count + 1 :]
        grad_x: Tensor | None = None
        grad_weights: list[Tensor | None] = [None] * count
        grad_biases: list[Tensor | None] = [None] * count
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if ctx.needs_input_grad[0]:
                transposed = weights[i].t()
                grad_x = gradient @ transposed if grad_x is None else grad_x.addmm_(gradient, transposed)
            if needs_bias[i]:
                grad_biases[i] = column_sums(gradient, ctx.bias_dtypes[i])
            if needs_weight[i]:
                grad_weights[i] = _grad_weight(ctx.shared[i], ctx.indices[i], x, gradient)
        return grad_x, *grad_weights, *grad_biases


def _grad_weight(shared: SharedGradients | None, index: int, x: Tensor, gradient: Tensor) -> Tensor | None:
    """The gradient of a weight; None where it was added to those of the other layers."""
    if shared is None:
        return x.t() @ gradient
    shared.add_product(index, x.t(), gradient)
    return None
