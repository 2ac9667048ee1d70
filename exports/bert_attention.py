"""What a BERT-like encoder of transformers has: its head, and queries, keys and values, which it does not return."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from sharebert_common.errors import BadInput


def has_mlm_head(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` names a class with a masked-language-model head; ELECTRA's pretraining has another."""
    endings = ("ForMaskedLM",) if config.get("model_type") == "electra" else ("ForMaskedLM", "ForPreTraining")
    return any(str(name).endswith(endings) for name in config.get("architectures") or ())


DISTILBERT = {"query": "q_lin", "key": "k_lin", "value": "v_lin"}
"""How DistilBERT calls the projections."""


def keep_projections(
    model: Any, layers: Iterable[int], names: Iterable[str], seen: dict[tuple[int, str], Tensor], where: str
) -> float:
    """Write what the layers' projections give in each forward pass into `seen`, from now on.

    Args:
        model: a model of transformers like BERT, RoBERTa, ELECTRA, DistilBERT or ALBERT.
        layers: numbers of layers, from 1.
        names: of the projections: `query`, `key`, `value`.
        seen: (layer, name) → [B, heads, T, d] of the last forward pass.
        where: begins the message: the key that asks for this, and the model's folder.

    Returns the factor 1/√d on products of queries and keys. Raises BadInput: the model has other layers.
    """
    heads, width = int(model.config.num_attention_heads), int(model.config.hidden_size)
    names = tuple(names)
    for layer in layers:
        for name in names:
            width = _keep(model, (layer, name), heads, seen, where)
    return float((width // heads) ** -0.5)


def _keep(model: Any, place: tuple[int, str], heads: int, seen: dict[tuple[int, str], Tensor], where: str) -> int:
    """See `keep_projections`; the width of all heads together."""
    layer, name = place
    ends = [f"layer.{layer - 1}.attention.self.{name}", f"layer.{layer - 1}.attention.{DISTILBERT[name]}"]
    first, calls = 0, 1
    if model.config.model_type == "albert" and model.config.inner_group_num == 1:
        count = model.config.num_hidden_layers
        groups = [int(i / (count / model.config.num_hidden_groups)) for i in range(count)]
        group = groups[layer - 1]
        first, calls = groups[: layer - 1].count(group), groups.count(group)
        ends = [f"albert_layer_groups.{group}.albert_layers.0.attention.{name}"]
    found = [module for path, module in model.named_modules() if path.endswith(tuple(ends))]
    if len(found) != 1:
        raise BadInput(f"{where} has no module {ends[0]}; attention and relations need a model like BERT")
    call = itertools.count()

    def keep(module: nn.Module, given: Any, output: Tensor) -> None:
        if next(call) % calls == first:  # the layers of an ALBERT are calls of one module
            seen[place] = output.unflatten(-1, (heads, -1)).transpose(1, 2)

    found[0].register_forward_hook(keep)
    return int(found[0].out_features)  # of MobileBERT less than the hidden size
