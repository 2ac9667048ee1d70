"""The operations that make up a layer: one interface, and its reference in plain PyTorch.

Everything in the model that is worth fusing goes through these functions. On CUDA, where Triton is installed,
the kernels of `kernels_triton_*.py` do the work; elsewhere, and while torch.compile traces (it fuses by itself),
the reference. Reductions, LayerNorm statistics, softmax and the loss are in float32, and in float64 where the
input is.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .config import ShareBertError
from .kernels_cpu import Dropout, DropoutAttention

CHUNK_LOGITS = 2**24
"""Logits that exist at a time in `linear_cross_entropy`: 64 MiB in float32, 549 rows of a 30,528-word vocabulary."""


class TritonKernels(NamedTuple):
    """What the `kernels_triton_*.py` offer."""

    add_dropout_norm: Any
    bias_gelu: Any
    chunk_cross_entropy: Any


@functools.cache
def load_triton() -> TritonKernels | None:
    """The Triton kernels, or None where Triton is not installed. Not before they are needed: they take a second."""
    try:
        from .kernels_triton_gelu import BiasGelu
        from .kernels_triton_loss import chunk_cross_entropy
        from .kernels_triton_norm import AddDropoutNorm
    except ImportError:
        return None
    return TritonKernels(AddDropoutNorm.apply, BiasGelu.apply, chunk_cross_entropy)


def triton_for(x: Tensor) -> TritonKernels | None:
    """The Triton kernels where they serve for `x`, and None where the reference does."""
    return load_triton() if x.is_cuda and not torch.compiler.is_compiling() else None


def on_plain_cpu(x: Tensor) -> bool:
    """Whether what `kernels_cpu` offers serves for `x`."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which products with `tensor` run: autocast's where it is on, the tensor's own elsewhere."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [m, n] += a [m, k] · b [k, n], without a temporary where the dtypes are one."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [n] of the columns of x [m, n], in `dtype`; added up in float32 at least."""
    if x.device.type != "cpu":
        return x.sum(0, dtype=dtype)
    if x.dtype == accumulation_dtype(x.dtype):  # `sum(0)` took 8 ms for [512, 2048] in float32, this 0.1 ms
        return torch.mv(x.t(), x.new_ones(len(x))).to(dtype)
    return x.sum(0).to(dtype)  # rounded once; asked for another dtype, it would copy x


class SharedGradients:
    """The gradients of weights that one node made and several layers use, summed beside autograd.

    They belong to one backward pass: what another left, which was asked for gradients of something else alone and
    so never came to the node, is not added to.
    """

    def __init__(self, count: int) -> None:
        self._sums: list[Tensor | None] = [None] * count
        self._backward_pass: int | None = None

    def add_product(self, place: int, a: Tensor, b: Tensor) -> None:
        """Add a [in, m] · b [m, out] to the gradient of the weight [in, out] at `place`."""
        self._forget_another_pass()
        total = self._sums[place]
        if total is None:
            self._sums[place] = a @ b
        else:
            total.addmm_(a, b)

    def take(self, handed: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """The gradient of each weight: the sums here, and those that autograd hands over."""
        self._forget_another_pass()
        sums, self._sums = self._sums, [None] * len(self._sums)
        return [
            other if ours is None else ours if other is None else ours.add_(other)
            for ours, other in zip(sums, handed, strict=True)
        ]

    def _forget_another_pass(self) -> None:
        this = torch._C._current_graph_task_id()
        if this != self._backward_pass:
            self._sums, self._backward_pass = [None] * len(self._sums), this


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., in] · weight [in, out] + bias [out].

    One `addmm` on views: neither the weight nor, in the backward pass, its gradient is copied or transposed. The
    gradients of a weight that several layers share (made by `virtual`) are summed by the products that make them.
    """
    dtype = compute_dtype(x)
    flat, weight = x.flatten(0, -2).to(dtype), weight.to(dtype)
    multiply = torch.addmm if torch.compiler.is_compiling() else _Linear.apply
    y = multiply(bias, flat, weight)
    return y.view(*x.shape[:-1], weight.shape[1])  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """Where the weight's node has `shared_gradients`, adds to them and hands no gradient of the weight on.

    Autograd would make each layer's gradient of a weight in memory of its own, and then add them up: two more
    passes over it for every use.
    """

    @staticmethod
    def forward(ctx: Any, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype
        ctx.shared, ctx.place = getattr(weight.grad_fn, "shared_gradients", None), weight.output_nr
        return torch.addmm(bias.to(x.dtype), x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_bias, for_x, for_weight = ctx.needs_input_grad
        grad_x = gradient @ weight.t() if for_x else None
        grad_bias = column_sums(gradient, ctx.bias_dtype) if for_bias else None
        if not for_weight:
            return grad_bias, grad_x, None
        if ctx.shared is None:
            return grad_bias, grad_x, x.t() @ gradient
        ctx.shared.add_product(ctx.place, x.t(), gradient)
        return grad_bias, grad_x, None


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x·W + b) with the exact (erf) GELU; shapes as in `linear`."""
    if fused := triton_for(x):
        product = x.flatten(0, -2) @ weight
        return fused.bias_gelu(product, bias).view(*x.shape[:-1], weight.shape[1])  # type: ignore[no-any-return]
    return F.gelu(linear(x, weight, bias))


def dropped(x: Tensor, dropout: float) -> Tensor:
    """Dropout with probability `dropout` above 0, on a CPU to 16 bits of it."""
    if on_plain_cpu(x):
        return Dropout.apply(x, dropout)  # type: ignore[no-any-return]
    return F.dropout(x, dropout)


def add_dropout_norm(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """stream + dropout(branch), and its LayerNorm in the dtype in which products run; all [..., H].

    Args:
        stream: the residual stream.
        branch: what the last block adds to it; None where there is nothing to add yet.
        weight: LayerNorm's, [H].
        bias: LayerNorm's, [H].
        eps: LayerNorm's.
        dropout: probability with which values of `branch` are dropped; 0 outside training.
    """
    if fused := triton_for(stream):
        summed, normed = fused.add_dropout_norm(stream, branch, weight, bias, eps, dropout, compute_dtype(stream))
        return stream if summed is None else summed, normed
    if branch is not None:
        stream = stream + (dropped(branch, dropout) if dropout else branch)
    normed = F.layer_norm(stream, weight.shape, weight, bias, eps)
    return stream, normed.to(compute_dtype(normed))


def flex_serves(x: Tensor) -> bool:
    """Whether FlexAttention keeps documents apart on the device of `x`: on CUDA. Elsewhere SDPA does, with a mask."""
    return x.is_cuda


def document_mask(document_ids: Tensor) -> Any:
    """What `attention` takes as a mask to keep the documents of rows apart.

    Args:
        document_ids: [B, T], the number of each position's document. Padding is a document like the others.
    """
    if flex_serves(document_ids):
        from .kernels_flex import document_mask as flex_mask

        return flex_mask(document_ids)
    return document_ids[:, None, :, None] == document_ids[:, None, None, :]


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, dropout: float) -> Tensor:
    """softmax(query·keyᵀ·scale)·value with dropout on the probabilities; all [B, heads, T, d].

    Args:
        mask: booleans that broadcast to [B, heads, T, T], true where a query (row) sees a key (column);
            None where every query sees every key; or from `document_mask`.
        scale: the factor on scores.
        dropout: probability with which an attention probability is dropped; 0 outside training.

    Raises ShareBertError for dropout within documents on CUDA: FlexAttention has none.
    """
    if mask is not None and not isinstance(mask, Tensor):
        if dropout:
            raise ShareBertError(
                f"attention_probs_dropout_prob: {dropout:g}, but attention within documents has no dropout on "
                "probabilities on CUDA: set it to 0 (hidden_dropout_prob may stay)"
            )
        from .kernels_flex import attention_within

        return attention_within(query, key, value, mask, scale)
    if dropout and on_plain_cpu(query):  # where SDPA has no fused kernel for it either
        sums = accumulation_dtype(query.dtype)
        return DropoutAttention.apply(query, key, value, mask, scale, dropout, sums)  # type: ignore[no-any-return]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, loss_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of hidden·weightᵀ + bias, and of the right guesses.

    The logits [N, V] are made in chunks of rows, and the gradients with them: they never exist whole.

    Args:
        hidden: [N, K].
        weight: [V, K].
        bias: [V] or None.
        labels: [N], int64, from 0 to V - 1 (also where the weight is 0).
        loss_weights: [N], float32; 0 leaves a row out.

    Returns:
        Two scalars, float32 (float64 for float64 input): Σ weightsᵢ·(−log p(labelᵢ)), which has a gradient,
        and Σ weightsᵢ·[argmax = labelᵢ], which has none.
    """
    loss_sum, correct = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, loss_weights, compute_dtype(hidden), torch.is_grad_enabled()
    )
    return loss_sum, correct


def chunk_cross_entropy(
    logits: Tensor, bias: Tensor | None, labels: Tensor, loss_weights: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The two sums of `linear_cross_entropy` over a chunk of rows, and the gradient of the first.

    Args:
        logits: [n, V], without the bias; the gradient may be written over them.
        bias: [V] or None.
        labels: [n], int64.
        loss_weights: [n].
        with_gradient: where it is false, what is returned third means nothing.

    Returns:
        Two scalars in float32 (float64), and [n, V] in the dtype of `logits`.
    """
    dtype = logits.dtype
    logits = logits.to(accumulation_dtype(dtype))
    target, row_weights = labels.unsqueeze(1), loss_weights.to(logits.dtype).unsqueeze(1)
    if bias is not None:
        logits += bias
    log_z = logits.logsumexp(1, keepdim=True)
    loss_sum = ((log_z - logits.gather(1, target)) * row_weights).sum()
    correct = ((logits.argmax(1, keepdim=True) == target) * row_weights).sum()
    if with_gradient:
        logits.sub_(log_z).exp_()
        logits.scatter_add_(1, target, logits.new_full(target.shape, -1.0))
        logits *= row_weights
    return loss_sum, correct, logits.to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward pass, while a chunk's logits are there, for a loss gradient of 1.

    So the logits are computed once, and the weight need not be kept (or gathered again, where it is partitioned).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        loss_weights: Tensor,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        sums = accumulation_dtype(dtype)
        x, w = hidden.to(dtype), weight.to(dtype)
        for_hidden, for_weight, for_bias = (with_gradient and needed for needed in ctx.needs_input_grad[:3])
        grad_hidden = hidden.new_empty(hidden.shape, dtype=sums) if for_hidden else None
        grad_weight = grad_bias = None
        loss_sum, correct = torch.zeros(2, dtype=sums, device=hidden.device).unbind()

        fused = triton_for(x)
        one_chunk = fused.chunk_cross_entropy if fused else chunk_cross_entropy
        rows_at_once = max(1, CHUNK_LOGITS // len(weight))
        for first in range(0, len(hidden), rows_at_once):
            rows = slice(first, first + rows_at_once)
            logits = x[rows] @ w.t()
            loss, hits, grad_logits = one_chunk(logits, bias, labels[rows], loss_weights[rows], with_gradient)
            loss_sum += loss
            correct += hits
            if for_bias:
                bias_part = column_sums(grad_logits, sums)
                grad_bias = bias_part if grad_bias is None else grad_bias.add_(bias_part)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ w
            if for_weight and grad_weight is None:
                grad_weight = (grad_logits.t() @ x[rows]).to(sums)
            elif grad_weight is not None:
                accumulate_product(grad_weight, grad_logits.t(), x[rows])

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = [None if given is None else given.dtype for given in (hidden, weight, bias)]
        ctx.mark_non_differentiable(correct)
        return loss_sum, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since a decoder's gradient is as large as the decoder; autograd refuses a second backward. The
        # cast comes last, so that a loss scale in `grad_loss` acts before values are rounded to half precision.
        gradients = [
            None if saved is None else saved.mul_(grad_loss).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None, None)
