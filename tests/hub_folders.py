"""Folders of Hugging Face encoders, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_tokenizer


def hub_folder(folder: Path, head: str, seed: int = 0, **changes: Any) -> Path:
    """A tiny BERT with a tokenizer, as `save_pretrained` writes it; `head` as in `AutoModelFor<head>`."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
    from transformers import PreTrainedTokenizerFast as Fast

    place = folder.parent / f"{folder.name}-tokenizer"
    place.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    words = {"vocab_size": 304, "max_position_embeddings": 32}
    config = BertConfig(**{**words, **sizes, **changes})
    config.id2label = {0: "bad", 1: "good"}
    torch.manual_seed(seed)
    classes = {"": BertModel, "MaskedLM": BertForMaskedLM, "SequenceClassification": BertForSequenceClassification}
    model = classes[head](config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    Fast(tokenizer_file=str(tiny_tokenizer(place)), unk_token="[UNK]", model_max_length=32, **names).save_pretrained(
        folder
    )
    return folder
