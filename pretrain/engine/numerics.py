"""Settings of PyTorch that decide how CUDA rounds, and whether it repeats itself. On a CPU they change nothing."""

from __future__ import annotations

import os

import torch

CUDNN_DROPOUT_STEPS = 16
"""cuDNN's attention may round the probability of dropout to a multiple of 1/16 (pytorch#174245)."""


def set_numerics(attention_dropout: float, *, deterministic: bool) -> None:
    """Set them for this process, before its first CUDA product.

    - Products of bf16 and fp16 are summed in fp32: cuBLAS may otherwise split a long sum, and add the parts in 16 bits.
    - cuDNN's attention is left out where it would round the dropout, and in a deterministic training.
    - `deterministic`: the same rows, weights and seeds give the same bits on the same GPUs. Operations that cannot do
      this raise an error. Without it, attention and the gradient of the embedding add up in an order that changes.

    Args:
        attention_dropout: probability with which an attention probability is dropped.
        deterministic: repeat bit by bit, at some cost of speed.
    """
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    rounds = (attention_dropout * CUDNN_DROPOUT_STEPS) % 1 != 0
    torch.backends.cuda.enable_cudnn_sdp(not rounds and not deterministic)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # else it fills each tensor
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is loaded
