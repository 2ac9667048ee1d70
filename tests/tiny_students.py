"""A student for tests of distillation, and a micro-batch that it and its teacher read."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.data.batches import MicroBatch
from sharebert import ShareBertConfig


def student_config(**changes: Any) -> ShareBertConfig:
    keys = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    keys |= {"num_attention_heads": 4, "factor_size": 8, "max_position_embeddings": 32, "mlm_head": "tied"}
    keys |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ShareBertConfig.from_dict(keys | changes)


def micro_batch() -> MicroBatch:
    """Three rows: a whole one of two documents, one with padding, and one that only fills up the shape."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 301, (3, 32), generator=generator)
    documents = torch.ones(3, 32, dtype=torch.uint8)
    documents[0, 20:] = 2
    documents[1, 25:] = 0
    positions = torch.tensor([3, 17, 32, 40, 0, 0])
    labels = torch.randint(5, 301, (6,), generator=generator)
    return MicroBatch(tokens, documents, positions, labels, torch.tensor([1.0, 1, 1, 1, 0, 0]), padded=True)
