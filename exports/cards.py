"""The model card: the README.md of an export."""

from __future__ import annotations

from collections.abc import Mapping

from exports.kinds import Classifier, HeadlessEncoder, Kind
from exports.meta_device import without_weights
from sharebert.config import ShareBertConfig
from sharebert.heads import ShareBertForMaskedLM

_CARD = """\
---
library_name: transformers
pipeline_tag: {task}
tags: [{tags}]
---

# ShareBERT{form}

A BERT-class encoder {layers}
{about}
## Sizes

| | |
|---|---|
{sizes}

## How to load

{loading}
"""

_METHOD = """The method is Hu, Cavicchioli, Berardinelli and Capotondi,
"ShareBERT: Embeddings Are Capable of Learning Hidden Layers", AAAI 2024."""

_LAYERS = {
    "veps": f"""whose layers have no weight matrices of their own: every one is cut from the matrix
E·W_allᵀ + b_all, made from the word embeddings E. {_METHOD}""",
    "eps": f"""whose layers have no weight matrices of their own: every one is cut from the word
embeddings E. {_METHOD}""",
    "layers": "whose layers all use one set of weight matrices, as ALBERT's do.",
    "none": "in which every layer has weight matrices of its own, as in BERT.",
    "low_rank": "whose layers all use one set of weight matrices, each a product of two smaller ones.",
}
"""By `sharing`."""

_TRANSFORMERS = """
```python
from transformers import {auto_class}, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = {auto_class}.from_pretrained(folder{trust})
outputs = model(**tokenizer("Some text.", return_tensors="pt"))
```
"""

_FILL = """
```python
from transformers import pipeline

fill = pipeline("fill-mask", model=folder{trust})
fill(f"Some {{fill.tokenizer.mask_token}} text.")
```
"""

_CLASSIFY = """
```python
from transformers import pipeline

classify = pipeline("text-classification", model=folder{trust})
classify("Some text.")
```
"""

_ONNX_RUNTIME = """
```python
import onnxruntime
from transformers import AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
outputs = session.run(None, dict(tokenizer("Some text.", return_tensors="np")))
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
This is its dense form: every matrix is written out, and every layer has its own copy of those that it shares, because
`megatron_bert` cannot share matrices. The ONNX form keeps one copy.
On a batch of random words, in float32, it differs from the compact form, relative to the largest value, by
{differences}.
"""
_DENSE_END = """
What does not fit `megatron_bert`: its pooler ends in tanh and the compact form's does not, so that the pooled
output here is the tanh of the compact form's.
"""

_ONNX_LOADING = (
    "`model.onnx` has a dynamic batch and length. Inputs, int64 [batch, length]: `input_ids`, `attention_mask`, and\n"
    "`token_type_ids`, which may be left away (all 0 then; ONNX Runtime lists it among the overridable initializers).\n"
    "Outputs: `last_hidden_state`, `pooler_output` and, with a masked-language-model head, `logits`; of a classifier,\n"
    "`logits` alone."
)
_ONNX_ABOUT = (
    "\nThis is its ONNX form: matrices that layers share are written out once. The input embedding stays in its\n"
    "factors.\n"
)
_ONNX_END = "\nThe pooled output is the tanh of the compact form's, as in `megatron_bert`.\n"


def model_card(config: ShareBertConfig, kind: Kind, sections: Mapping[str, str]) -> str:
    """The card of a compact export in Markdown: sizes, how to load it, and `sections` (heading → text), in order."""
    loading = _COMPACT_LOADING + "\n" + _transformers(kind, trust=", trust_remote_code=True")
    return _card(config, kind, sections, form="", about="", loading=loading + _COMPACT_END)


def dense_card(
    config: ShareBertConfig, kind: Kind, differences: Mapping[str, float], sections: Mapping[str, str]
) -> str:
    """The card of a dense export; `differences` by output, relative to the compact form's largest value."""
    said = " and ".join(f"{value:.1e} in its {name}" for name, value in differences.items())
    loading = _DENSE_LOADING + "\n" + _transformers(kind, trust="")
    about = _DENSE_ABOUT.format(differences=said)
    return _card(config, kind, sections, form=", dense", about=about, loading=loading + _DENSE_END)


def onnx_card(config: ShareBertConfig, kind: Kind, sections: Mapping[str, str]) -> str:
    """The card of an ONNX export."""
    loading = _ONNX_LOADING + "\n" + _ONNX_RUNTIME + _ONNX_END
    return _card(config, kind, sections, form=", ONNX", about=_ONNX_ABOUT, loading=loading)


def sections_of(card: str) -> dict[str, str]:
    """The `sections` of a card that this file wrote."""
    parts = [part.partition("\n") for part in card.split("\n## ")[1:]]
    return {heading: body.strip() for heading, _, body in parts if heading not in ("Sizes", "How to load")}


def _card(config: ShareBertConfig, kind: Kind, sections: Mapping[str, str], form: str, about: str, loading: str) -> str:
    text = _CARD.format(
        task=kind.task,
        tags="sharebert, bert" if form else "sharebert, bert, compact",
        form=form,
        layers=_LAYERS[config.sharing],
        about=about,
        sizes="\n".join(f"| {name} | {value} |" for name, value in _sizes(config).items()),
        loading=loading.rstrip("\n"),
    )
    return text + "".join(f"\n## {heading}\n\n{body.strip()}\n" for heading, body in sections.items())


def _transformers(kind: Kind, trust: str) -> str:
    text = _TRANSFORMERS.format(auto_class=kind.auto_class, trust=trust)
    match kind:
        case HeadlessEncoder():
            return text
        case Classifier():
            return text + _CLASSIFY.format(trust=trust)
        case _:
            return text + _FILL.format(trust=trust)


def _sizes(config: ShareBertConfig) -> dict[str, str]:
    with without_weights():
        model = ShareBertForMaskedLM(config)
    head = {"untied": "a decoder of its own", "tied": "tied to the word embeddings", "none": "none"}[config.mlm_head]
    wide = 2 * config.ffn_pairs * config.hidden_size * config.inner_size
    values = 4 * config.hidden_size * config.attention_size + wide
    count = "six" if config.ffn_pairs == 1 else str(4 + 2 * config.ffn_pairs)
    return {
        "learned parameters of the encoder": f"{sum(p.numel() for p in model.sharebert.parameters()):,}",
        "learned parameters with the masked-language-model head": f"{sum(p.numel() for p in model.parameters()):,}",
        f"values of the {count} {'generated matrices' if config.generates else 'matrices of a layer'}": f"{values:,}",
        "vocabulary": f"{config.vocab_size:,} (a multiple of {config.vocab_pad_multiple})",
        "factor size": f"{config.factor_size:,}" + (f" ({config.sharing.upper()})" if config.generates else ""),
        "hidden size, intermediate size": f"{config.hidden_size:,}, {config.inner_size:,}",
        **_ranks(config),
        "layers, attention heads": f"{config.num_hidden_layers}, {config.heads}",
        "longest input": f"{config.max_position_embeddings} tokens",
        "masked-language-model head": head,
    }


def _ranks(config: ShareBertConfig) -> dict[str, str]:
    if config.rank is None:
        return {}
    others = (f", {rank:,} of {name}" for name, rank in (config.ranks or {}).items())
    return {"rank of the products that matrices are": f"{config.rank:,}{''.join(others)}"}
