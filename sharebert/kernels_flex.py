"""Attention within documents on CUDA, by PyTorch's FlexAttention: blocks between two documents cost nothing.

FlexAttention is compiled for the mask and keeps no [T, T] tensor, but has no dropout on probabilities. SDPA's
memory-efficient kernel has dropout, but reads a mask of [B, T, T] in every head and computes every block.
PyTorch's FlashAttention kernel for sequences of different lengths has no dropout either.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@functools.cache
def _for_device(kind: str) -> tuple[Any, Any]:
    """(create_block_mask, flex_attention), compiled on CUDA, because only compiled they are fused. Shapes are fixed."""
    if kind != "cuda":
        return create_block_mask, flex_attention
    return torch.compile(create_block_mask), torch.compile(flex_attention, dynamic=False)


def document_mask(document_ids: Tensor) -> BlockMask:
    """The blocks of [T, T] that hold a pair of positions of one document, from document ids [B, T]."""
    make, _ = _for_device(document_ids.device.type)

    def same_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document_ids[row, query] == document_ids[row, key]

    rows, length = document_ids.shape
    return make(same_document, rows, None, length, length, device=document_ids.device)  # type: ignore[no-any-return]


def attention_within(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """As `kernels.attention` without dropout, for a mask from `document_mask`."""
    _, flex = _for_device(query.device.type)
    return flex(query, key, value, block_mask=mask, scale=scale)  # type: ignore[no-any-return]
