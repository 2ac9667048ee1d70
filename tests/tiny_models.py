"""Tiny ShareBERT models for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

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
"""Keys of a config.json. No matrix fills its block of the virtual matrix, and none ends where a row ends."""

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *(f"w{i}" for i in range(TINY["vocab_size"] - len(SPECIAL)))]


def tiny_config(**changes: Any) -> ShareBertConfig:
    """A valid tiny config; `sharing: eps` sets the factor size that it needs."""
    if changes.get("sharing") == "eps":
        changes.setdefault("factor_size", changes.get("hidden_size", TINY["hidden_size"]))
    return ShareBertConfig.from_dict({**TINY, **changes})


def tiny_model(seed: int = 0, init: str = "authors", **changes: Any) -> ShareBertForMaskedLM:
    """A tiny model in which no parameter is 0 or 1, so that no neutral value hides a mistake."""
    model = ShareBertForMaskedLM(tiny_config(**changes))
    initialize(model, init, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_tokenizer(folder: Path) -> Path:
    """A `tokenizer.json` in `folder` for `tiny_model`: the special tokens, then the words w0 … w244."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"
