"""The operations of a layer and of the loss that are worth fusing: one interface, and its reference in PyTorch.

The model calls these functions alone. On CUDA with Triton installed, the kernels in `kernels_triton_*.py` do the
work. Everywhere else, and while the model is traced, the reference does. Reductions, LayerNorm
statistics, softmax and the loss are in float32, and in float64 for float64 input.
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
from .precision import accumulate_product, accumulation_dtype, column_sums, compute_dtype
from .shared_linear import LowRank, linear, matmul, narrowed
from .tracing import is_traced

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**28}
"""How many logits `linear_cross_entropy` holds at a time, by the type of the device. A CPU's 2^24 are 64 MiB in float32
and 549 rows of a 30,528-word vocabulary. Each chunk reads and writes the decoder's whole gradient, so that a GPU, which
has the memory, takes 8,793 rows: 512 MiB in bfloat16."""

FLEX_FROM = 257
"""Shortest row for which FlexAttention serves. It skips blocks of 128 positions, so shorter rows have little to skip,
and SDPA has dropout."""


class TritonKernels(NamedTuple):
    """The operations that have a Triton kernel."""

    add_dropout_norm: Any
    bias_gelu: Any
    chunk_cross_entropy: Any
    cut_slab: Any
    fill_slab: Any


@functools.cache
def load_triton() -> TritonKernels | None:
    """The Triton kernels, or None where Triton is not installed. Loaded at the first use: it takes a second."""
    try:
        from .kernels_triton_gelu import FusedBiasGelu
        from .kernels_triton_loss import chunk_cross_entropy
        from .kernels_triton_norm import FusedAddDropoutNorm
        from .kernels_triton_slab import cut_slab, fill_slab
    except ImportError:
        return None
    return TritonKernels(FusedAddDropoutNorm.apply, FusedBiasGelu.apply, chunk_cross_entropy, cut_slab, fill_slab)


def triton_for(x: Tensor) -> TritonKernels | None:
    """The Triton kernels if they can run on `x`, else None: the reference runs."""
    return load_triton() if x.is_cuda and not is_traced() else None


def cpu_kernels_for(x: Tensor) -> bool:
    """Whether the functions of `kernels_cpu` can run on `x`."""
    return x.device.type == "cpu" and not is_traced()


def linear_gelu(x: Tensor, weight: Tensor | LowRank, bias: Tensor) -> Tensor:
    """gelu(x·W + b) with the exact (erf) GELU; shapes as in `linear`."""
    x, weight = narrowed(x, weight)
    if fused := triton_for(x):
        return fused.bias_gelu(matmul(x, weight), bias).view(*x.shape[:-1], weight.shape[1])  # type: ignore[no-any-return]
    return F.gelu(linear(x, weight, bias))


def dropped(x: Tensor, dropout: float) -> Tensor:
    """Dropout with probability `dropout` above 0; on a CPU the probability is rounded to 16 bits."""
    if cpu_kernels_for(x):
        return Dropout.apply(x, dropout)  # type: ignore[no-any-return]
    return F.dropout(x, dropout)


def add_dropout_norm(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """stream + dropout(branch), and the LayerNorm of that sum in the dtype in which products run; all [..., H].

    Args:
        stream: the residual stream.
        branch: what the last block adds to the stream; None before the first block.
        weight: LayerNorm's weight, [H].
        bias: LayerNorm's bias, [H].
        eps: LayerNorm's epsilon.
        dropout: probability with which a value of `branch` is dropped; 0 outside training.
    """
    if fused := triton_for(stream):
        summed, normed = fused.add_dropout_norm(stream, branch, weight, bias, eps, dropout, compute_dtype(stream))
        return stream if summed is None else summed, normed
    if branch is not None:
        stream = stream + (dropped(branch, dropout) if dropout else branch)
    normed = F.layer_norm(stream, weight.shape, weight, bias, eps)
    return stream, normed.to(compute_dtype(normed))


def flex_serves(device: torch.device, length: int) -> bool:
    """Whether FlexAttention keeps documents apart in rows of `length` tokens: on CUDA, in long rows. Else SDPA does."""
    return device.type == "cuda" and length >= FLEX_FROM


def document_mask(document_ids: Tensor) -> Any:
    """The mask for `attention` that keeps the documents of a row apart.

    Args:
        document_ids: [B, T], the number of each position's document. Padding counts as one more document.
    """
    if flex_serves(document_ids.device, document_ids.shape[1]):
        from .kernels_flex import document_mask as flex_mask

        return flex_mask(document_ids)
    return document_ids[:, None, :, None] == document_ids[:, None, None, :]


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, dropout: float) -> Tensor:
    """softmax(query·keyᵀ·scale)·value with dropout on the probabilities; all [B, heads, T, d].

    Args:
        mask: booleans that broadcast to [B, heads, T, T], true where a query (row) sees a key (column); or numbers of
            that shape that are added to the scores; None if every query sees every key; or the result of
            `document_mask`.
        scale: the factor on scores.
        dropout: probability with which an attention probability is dropped; 0 outside training.

    Raises ShareBertError for dropout with FlexAttention's mask: it has no dropout.
    """
    if mask is not None and not isinstance(mask, Tensor):
        if dropout:
            raise ShareBertError(
                f"attention_probs_dropout_prob: {dropout:g}, but attention within documents has no dropout on "
                f"probabilities in rows of {FLEX_FROM} tokens or more on CUDA: set it to 0 (hidden_dropout_prob may "
                "stay)"
            )
        from .kernels_flex import attention_within

        return attention_within(query, key, value, mask, scale)
    if mask is not None and mask.is_floating_point():  # SDPA takes it in the dtype of the query alone
        mask = mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
    elif dropout and cpu_kernels_for(query):  # SDPA has no fused kernel with dropout for CPUs
        sums = accumulation_dtype(query.dtype)
        return DropoutAttention.apply(query, key, value, mask, scale, dropout, sums)  # type: ignore[no-any-return]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, loss_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropies of hidden·weightᵀ + bias, and of the correct predictions.

    The logits [N, V] and their gradient are made in chunks of rows: they never exist whole.

    Args:
        hidden: [N, K].
        weight: [V, K].
        bias: [V] or None.
        labels: [N], int64, from 0 to V - 1 (also in rows whose loss weight is 0).
        loss_weights: [N], float32; a row with weight 0 does not count.

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
        logits: [n, V], without the bias; the gradient may overwrite them.
        bias: [V] or None.
        labels: [n], int64.
        loss_weights: [n].
        with_gradient: whether to make the gradient; if false, the third result has no meaning.

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
    """Makes the gradients in the forward pass, while a chunk's logits exist, as if the loss had gradient 1.

    So the logits are computed once, and the weight is not kept (nor gathered again, if it is partitioned).
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
        needs_hidden, needs_weight, needs_bias = (with_gradient and needed for needed in ctx.needs_input_grad[:3])
        grad_hidden = hidden.new_empty(hidden.shape, dtype=sums) if needs_hidden else None
        grad_weight = grad_bias = None
        loss_sum, correct = torch.zeros(2, dtype=sums, device=hidden.device).unbind()

        fused = triton_for(x)
        one_chunk = fused.chunk_cross_entropy if fused else chunk_cross_entropy
        chunk = CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS["cpu"])
        rows_at_once = max(1, chunk // len(weight))
        for first in range(0, len(hidden), rows_at_once):
            rows = slice(first, first + rows_at_once)
            logits = x[rows] @ w.t()
            loss, hits, grad_logits = one_chunk(logits, bias, labels[rows], loss_weights[rows], with_gradient)
            loss_sum += loss
            correct += hits
            if needs_bias:
                bias_part = column_sums(grad_logits, sums)
                grad_bias = bias_part if grad_bias is None else grad_bias.add_(bias_part)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ w
            if needs_weight and grad_weight is None:
                grad_weight = (grad_logits.t() @ x[rows]).to(sums)
            elif grad_weight is not None:
                accumulate_product(grad_weight, grad_logits.t(), x[rows])

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(correct)
        return loss_sum, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because the decoder's gradient is as large as the decoder. So autograd refuses a second backward.
        # The cast comes last: a loss scale in `grad_loss` acts before values are rounded to half precision.
        gradients = [
            None if saved is None else saved.mul_(grad_loss).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None, None)
