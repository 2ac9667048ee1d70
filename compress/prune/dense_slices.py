"""A dense model with a smaller stream, fewer heads and fewer columns, as a smaller dense model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.prune.dense_parts import Kept
from compress.prune.directions import Directions, strongest
from exports.dense_model import DenseBert
from exports.meta_device import without_weights
from sharebert.config import ShareBertConfig


@torch.no_grad()
def sliced(
    model: DenseBert, config: ShareBertConfig, directions: Directions, kept: Sequence[Kept], head_rows: Tensor | None
) -> DenseBert:
    """The smaller model, in the dtype of the model; products are computed in float64.

    Weights and biases of a LayerNorm of the stream move into the matrices that read it, exactly; those of the new
    model are 1 and 0. So its hidden states are those of the model in other directions, without these factors.

    Args:
        model: the dense model.
        config: its sizes.
        directions: from its stream to the new one.
        kept: what stays of each layer.
        head_rows: numbers of the channels that stay inside the masked-language-model head, or between pooler and
            classifier, as many as the new stream has; None without either.
    """
    made: dict[str, Tensor] = {}
    dtype = model.bert.encoder.ln.weight.dtype
    size = directions.down.shape[1]

    def put(name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        made[f"{name}.weight"] = weight.to(dtype).contiguous()
        if bias is not None:
            made[f"{name}.bias"] = bias.to(dtype).contiguous()

    def put_norm(name: str) -> None:
        put(name, torch.ones(size), torch.zeros(size))

    def put_reader(name: str, linear: nn.Linear, norm: nn.LayerNorm, rows: Tensor) -> None:
        weight, bias = linear.weight[rows].double(), linear.bias[rows].double()
        put(name, (weight * norm.weight.double()) @ directions.up.t(), bias + weight @ norm.bias.double())

    def put_writer(name: str, linear: nn.Linear, columns: Tensor) -> None:
        down = directions.down
        put(name, down.t() @ linear.weight[:, columns].double(), linear.bias.double() @ down)

    embeddings, encoder = model.bert.embeddings, model.bert.encoder
    for name, part in embeddings.named_children():
        put(f"bert.embeddings.{name}", part.weight.double() @ directions.down)
    for number, (layer, stays) in enumerate(zip(encoder.layer, kept, strict=True)):
        prefix = f"bert.encoder.layer.{number}."
        channels = head_channels(stays.heads, config.head_size)
        put_norm(prefix + "attention.ln")
        for name in ("query", "key", "value"):
            linear = layer.attention.self.get_submodule(name)
            put_reader(f"{prefix}attention.self.{name}", linear, layer.attention.ln, channels)
        put_writer(prefix + "attention.output.dense", layer.attention.output.dense, channels)
        put_norm(prefix + "ln")
        put_reader(prefix + "intermediate.dense", layer.intermediate.dense, layer.ln, stays.columns)
        put_writer(prefix + "output.dense", layer.output.dense, stays.columns)
    put_norm("bert.encoder.ln")
    pooler, labels = model.bert.pooler.dense, 0
    pooled = strongest(pooler.weight.norm(dim=1), size)
    if model.classifier is not None:
        assert head_rows is not None
        pooled, labels = head_rows, model.classifier.out_features
        put("classifier", model.classifier.weight[:, pooled], model.classifier.bias.clone())
    put_reader("bert.pooler.dense", pooler, encoder.ln, pooled)
    if model.cls is not None:
        assert head_rows is not None
        head = model.cls.predictions
        put_reader("cls.predictions.transform.dense", head.transform.dense, encoder.ln, head_rows)
        norm = head.transform.LayerNorm
        put("cls.predictions.transform.LayerNorm", norm.weight[head_rows], norm.bias[head_rows])
        put("cls.predictions.decoder", head.decoder.weight[:, head_rows], head.decoder.bias.clone())
        made["cls.predictions.bias"] = head.decoder.bias.clone()  # it stands in a dense export twice
    with without_weights():
        small = DenseBert(smaller(config, size, len(kept[0].heads), len(kept[0].columns)), labels)
    small.load_state_dict(made, assign=True)
    return small.eval().requires_grad_(False)


def smaller(config: ShareBertConfig, hidden: int, heads: int, columns: int) -> ShareBertConfig:
    """The sizes of the smaller model."""
    changes: dict[str, Any] = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": columns}
    return dataclasses.replace(config, **changes)


def head_channels(heads: Tensor, head_size: int) -> Tensor:
    """Numbers of the channels of some heads."""
    return (heads[:, None] * head_size + torch.arange(head_size)).flatten()
