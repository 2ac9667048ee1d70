"""The queries, keys and values of a BERT-like encoder of transformers, which does not return them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sharebert_common.errors import BadInput


def keep_projections(
    model: Any, layers: Iterable[int], names: Iterable[str], seen: dict[tuple[int, str], Tensor], where: str
) -> float:
    """Write what the layers' projections give in each forward pass into `seen`, from now on.

    Args:
        model: a model of transformers whose layers have `attention.self.query`, `key` and `value`, as BERT's have.
        layers: numbers of layers, from 1.
        names: of the projections.
        seen: (layer, name) → [B, heads, T, d] of the last forward pass.
        where: begins the message: the key that asks for this, and the model's folder.

    Returns the factor 1/√d on products of queries and keys. Raises BadInput: the model has other layers.
    """
    heads = int(model.config.num_attention_heads)
    names = tuple(names)
    for layer in layers:
        for name in names:
            _keep(model, (layer, name), heads, seen, where)
    return float((model.config.hidden_size // heads) ** -0.5)


def _keep(
    model: nn.Module, place: tuple[int, str], heads: int, seen: dict[tuple[int, str], Tensor], where: str
) -> None:
    layer, name = place
    wanted = f"layer.{layer - 1}.attention.self.{name}"
    found = [module for path, module in model.named_modules() if path.endswith(wanted)]
    if len(found) != 1:
        raise BadInput(f"{where} has no module {wanted}; attention and relations need a model like BERT")

    def keep(module: nn.Module, given: Any, output: Tensor) -> None:
        seen[place] = output.unflatten(-1, (heads, -1)).transpose(1, 2)

    found[0].register_forward_hook(keep)
