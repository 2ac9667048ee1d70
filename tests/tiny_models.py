"""Tiny ShareBERT models for tests."""

from __future__ import annotations

from typing import Any

import torch

from sharebert import ShareBertConfig, ShareBertForMaskedLM, initialize

TINY: dict[str, Any] = {
    "vocab_size": 250,
    "factor_size": 8,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
"""Keys of a config.json; every block of the virtual matrix is cut short, and none ends where a row ends."""


def tiny_config(**changes: Any) -> ShareBertConfig:
    """A valid tiny config; `sharing: eps` brings its factor size along."""
    if changes.get("sharing") == "eps":
        changes.setdefault("factor_size", changes.get("hidden_size", TINY["hidden_size"]))
    return ShareBertConfig.from_dict({**TINY, **changes})


def tiny_model(seed: int = 0, init: str = "authors", **changes: Any) -> ShareBertForMaskedLM:
    """A tiny model with every parameter away from 0 and 1, so that no mistake hides behind a neutral value."""
    model = ShareBertForMaskedLM(tiny_config(**changes))
    initialize(model, init, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
