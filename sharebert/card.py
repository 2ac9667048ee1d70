"""The model card: the README.md of an export."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .config import ShareBertConfig
from .heads import ShareBertForMaskedLM

_CARD = """\
---
library_name: transformers
pipeline_tag: {task}
tags: [sharebert, bert, compact, parameter-sharing]
---

# ShareBERT

A BERT-class encoder whose layers have no weight matrices of their own: every one is cut from the matrix
E·W_allᵀ + b_all, made from the word embeddings E. The method is Hu, Cavicchioli, Berardinelli and Capotondi,
"ShareBERT: Embeddings Are Capable of Learning Hidden Layers", AAAI 2024.

## Sizes

| | |
|---|---|
{sizes}

## How to load

The code of the model is in this folder; nothing but `torch`, `transformers` and `safetensors` is needed.

```python
from transformers import {auto_class}, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto_class}.from_pretrained(folder, trust_remote_code=True)
outputs = model(**tokenizer("Some text.", return_tensors="pt"))
```
{pipeline}
The pooled output is x·W + b of the first position, without an activation. Pretraining does not train its bias.
"""

_PIPELINE = """
```python
from transformers import pipeline

fill = pipeline("fill-mask", model=folder, trust_remote_code=True)
fill(f"Some {fill.tokenizer.mask_token} text.")
```
"""


def model_card(config: ShareBertConfig, sections: Mapping[str, str]) -> str:
    """The card of a model in Markdown: sizes, how to load it, and `sections` (heading → text), in their order."""
    headless = config.mlm_head == "none"
    text = _CARD.format(
        task="feature-extraction" if headless else "fill-mask",
        auto_class="AutoModel" if headless else "AutoModelForMaskedLM",
        sizes="\n".join(f"| {name} | {value} |" for name, value in _sizes(config).items()),
        pipeline="" if headless else _PIPELINE,
    )
    return text + "".join(f"\n## {heading}\n\n{body.strip()}\n" for heading, body in sections.items())


def _sizes(config: ShareBertConfig) -> dict[str, str]:
    with torch.device("meta"):
        model = ShareBertForMaskedLM(config)
    head = {"untied": "a decoder of its own", "tied": "tied to the word embeddings", "none": "none"}[config.mlm_head]
    generated = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return {
        "parameters of the encoder": f"{sum(p.numel() for p in model.sharebert.parameters()):,}",
        "parameters with the masked-language-model head": f"{sum(p.numel() for p in model.parameters()):,}",
        "values of the six generated matrices, shared by all layers": f"{generated:,}",
        "vocabulary": f"{config.vocab_size:,} (a multiple of {config.vocab_pad_multiple})",
        "factor size": f"{config.factor_size:,} ({config.sharing.upper()})",
        "hidden size, intermediate size": f"{config.hidden_size:,}, {config.intermediate_size:,}",
        "layers, attention heads": f"{config.num_hidden_layers}, {config.num_attention_heads}",
        "longest input": f"{config.max_position_embeddings} tokens",
        "masked-language-model head": head,
    }
