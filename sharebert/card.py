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
tags: [{tags}]
---

# ShareBERT{form}

A BERT-class encoder whose layers have no weight matrices of their own: every one is cut from the matrix
E·W_allᵀ + b_all, made from the word embeddings E. The method is Hu, Cavicchioli, Berardinelli and Capotondi,
"ShareBERT: Embeddings Are Capable of Learning Hidden Layers", AAAI 2024.
{about}
## Sizes

| | |
|---|---|
{sizes}

## How to load

{loading}

```python
from transformers import {auto_class}, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = {auto_class}.from_pretrained(folder{trust})
outputs = model(**tokenizer("Some text.", return_tensors="pt"))
```
"""

_PIPELINE = """
```python
from transformers import pipeline

fill = pipeline("fill-mask", model=folder{trust})
fill(f"Some {{fill.tokenizer.mask_token}} text.")
```
"""

_COMPACT_LOADING = (
    "The code of the model is in this folder; `torch`, `transformers` and `safetensors` are all it needs."
)
_COMPACT_END = (
    "\nThe pooled output is x·W + b of the first position, without an activation; pretraining leaves b as it is.\n"
)

_DENSE_LOADING = "This is a stock `megatron_bert`: plain `transformers` loads it, with no code of its own."
_DENSE_ABOUT = """
This is its dense form: every generated matrix is written out, and every layer has weights of its own.
On a batch of random words, in float32, it differs from the compact form, relative to the largest value, by
{differences}.
"""
_DENSE_END = """
What does not fit `megatron_bert`: its pooler ends in tanh and the compact form's does not, so that the pooled
output here is the tanh of the compact form's.
"""


def model_card(config: ShareBertConfig, sections: Mapping[str, str]) -> str:
    """The card of an export in Markdown: sizes, how to load it, and `sections` (heading → text), in their order."""
    return _card(config, sections, form="", about="", loading=_COMPACT_LOADING, remote=True, end=_COMPACT_END)


def dense_card(config: ShareBertConfig, differences: Mapping[str, float], sections: Mapping[str, str]) -> str:
    """The card of a dense export; `differences` by output, relative to the compact form's largest value."""
    said = " and ".join(f"{value:.1e} in its {name}" for name, value in differences.items())
    about = _DENSE_ABOUT.format(differences=said)
    return _card(config, sections, form=", dense", about=about, loading=_DENSE_LOADING, remote=False, end=_DENSE_END)


def _card(
    config: ShareBertConfig, sections: Mapping[str, str], form: str, about: str, loading: str, remote: bool, end: str
) -> str:
    headless = config.mlm_head == "none"
    trust = ", trust_remote_code=True" if remote else ""
    text = _CARD.format(
        task="feature-extraction" if headless else "fill-mask",
        tags="sharebert, bert, compact" if remote else "sharebert, bert",
        form=form,
        about=about,
        auto_class="AutoModel" if headless else "AutoModelForMaskedLM",
        sizes="\n".join(f"| {name} | {value} |" for name, value in _sizes(config).items()),
        loading=loading,
        trust=trust,
    )
    text += "" if headless else _PIPELINE.format(trust=trust)
    return text + end + "".join(f"\n## {heading}\n\n{body.strip()}\n" for heading, body in sections.items())


def _sizes(config: ShareBertConfig) -> dict[str, str]:
    with torch.device("meta"):
        model = ShareBertForMaskedLM(config)
    head = {"untied": "a decoder of its own", "tied": "tied to the word embeddings", "none": "none"}[config.mlm_head]
    generated = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return {
        "learned parameters of the encoder": f"{sum(p.numel() for p in model.sharebert.parameters()):,}",
        "learned parameters with the masked-language-model head": f"{sum(p.numel() for p in model.parameters()):,}",
        "values of the six generated matrices": f"{generated:,}",
        "vocabulary": f"{config.vocab_size:,} (a multiple of {config.vocab_pad_multiple})",
        "factor size": f"{config.factor_size:,} ({config.sharing.upper()})",
        "hidden size, intermediate size": f"{config.hidden_size:,}, {config.intermediate_size:,}",
        "layers, attention heads": f"{config.num_hidden_layers}, {config.num_attention_heads}",
        "longest input": f"{config.max_position_embeddings} tokens",
        "masked-language-model head": head,
    }
