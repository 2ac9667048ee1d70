"""The step `prune_structure`: fewer attention heads, feed-forward columns and layers, sliced for real."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from compress.calibrate import calibration_batches
from compress.prune.amount import Amount, amount
from compress.prune.structure import Inputs, fisher, least_important, rescaled
from compress.step import FromCompact, Source, Tools, check_one_pair
from exports.export import model_of
from exports.forms import write_export
from exports.read import read_export
from exports.weight_source import all_tensors
from sharebert.config import ShareBertConfig
from sharebert.slices import slices_of
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

LAYERS = "sharebert.layers."


@dataclass(config=STRICT, kw_only=True, frozen=True)
class PruneStructure(FromCompact):
    """Remove attention heads, feed-forward columns and layers, those that calibration rows need least."""

    NAME = "prune_structure"

    heads: Amount | None = None
    """Attention heads that stay: a number, or a share below 1; none: all. They are the same heads in all layers."""
    columns: Amount | None = None
    """Columns of the feed-forward block that stay: a number, or a share below 1; none: all. They are the same columns
    in all layers."""
    layers: Amount | None = None
    """Layers that stay: a number, or a share below 1; none: all. Layers are removed before heads and columns."""
    rescale: bool = True
    """Multiply what stays by factors, and add to biases, so that outputs on calibration rows stay near (least
    squares)."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return True

    def check_config(self, config: ShareBertConfig) -> None:
        """See `FromCompact.check_config`."""
        if (self.heads, self.columns, self.layers) == (None, None, None):
            raise BadInput("prune_structure: nothing to remove; give heads, columns or layers")
        if not config.generates and (self.heads is not None or self.columns is not None):
            raise BadInput(
                f"prune_structure: heads and columns are removed from models with sharing: veps or eps, this one has "
                f"{config.sharing}; give layers alone"
            )
        if config.sharing == "none":
            raise BadInput(
                "prune_structure: takes models whose layers share their matrices, this one has sharing: none"
            )
        check_one_pair("prune_structure", config)
        self.amounts(config)

    def result_config(self, config: ShareBertConfig) -> ShareBertConfig:
        """See `Step.result_config`. Heads and columns are the first ones."""
        heads, columns, layers = self.amounts(config)
        return dataclasses.replace(
            config,
            num_hidden_layers=layers,
            kept_heads=config.kept_heads if heads == config.heads else tuple(range(heads)),
            kept_columns=config.kept_columns if columns == config.inner_size else tuple(range(columns)),
        )

    def amounts(self, config: ShareBertConfig) -> tuple[int, int, int]:
        """How many heads, columns and layers stay. Raises BadInput: more than there are."""
        return (
            amount("prune_structure.heads", self.heads, config.heads),
            amount("prune_structure.columns", self.columns, config.inner_size),
            amount("prune_structure.layers", self.layers, config.num_hidden_layers),
        )

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        export = read_export(source.folder)
        tensors = {name: tensor.float() for name, tensor in all_tensors(export.weights).items()}
        heads, columns, layers = self.amounts(export.config)
        rows = calibration_batches(source, tools)
        notes: dict[str, Any] = {}
        config = export.config
        if layers < config.num_hidden_layers:
            model = model_of(config, tensors)
            removed = sorted(least_important(fisher(model, rows, tools.seed).layers, config.num_hidden_layers - layers))
            inputs = Inputs(model, rows) if self.rescale else None
            tensors = without_layers(tensors, removed, inputs, config.branch_gain)
            config = dataclasses.replace(config, num_hidden_layers=layers)
            notes["layers removed"] = removed
        if heads < config.heads or columns < config.inner_size:
            model = model_of(config, tensors)
            importance = fisher(model, rows, tools.seed)
            kept_heads = _kept(importance.heads, config.heads - heads)
            kept_columns = _kept(importance.columns, config.inner_size - columns)
            inputs = Inputs(model, rows) if self.rescale else None
            config, tensors = sliced(config, tensors, kept_heads, kept_columns, inputs)
            notes["heads kept"] = list(config.kept_heads or range(config.heads))
        write_export(export.with_model(config, tensors), out)
        return notes | {"heads": config.heads, "columns": config.inner_size, "layers": config.num_hidden_layers}


def without_layers(
    tensors: dict[str, Tensor], removed: list[int], inputs: Inputs | None, gain: float | None = None
) -> dict[str, Tensor]:
    """The tensors without some layers, the others numbered anew. With `inputs`, what a removed layer added on average
    goes into the bias of the layer before it, over that branch's gain (`gain` where it is not learned); before the
    first layer, into the token types."""
    found = dict(tensors)
    count = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith(LAYERS))
    kept = [number for number in range(count) if number not in removed]
    if inputs is not None:
        for number in removed:
            before = [other for other in kept if other < number]
            name = f"{LAYERS}{before[-1]}.output_bias" if before else "sharebert.token_type_embeddings.weight"
            added = inputs.means[number, "branches"].float()
            if before and gain is not None:
                learned = tensors.get(f"{LAYERS}{before[-1]}.branch_gains")
                added = added / (gain if learned is None else learned[1])
            found[name] = found[name] + added
    for name in [name for name in found if name.startswith(LAYERS)]:
        tensor = found.pop(name)
        own, rest = name[len(LAYERS) :].split(".", 1)
        if int(own) in kept:
            found[f"{LAYERS}{kept.index(int(own))}.{rest}"] = tensor
    return found


def sliced(
    config: ShareBertConfig,
    tensors: dict[str, Tensor],
    kept_heads: list[int] | None,
    kept_columns: list[int] | None,
    inputs: Inputs | None,
) -> tuple[ShareBertConfig, dict[str, Tensor]]:
    """Config and tensors of the model with some heads and columns, numbered as in this model; None: all of them.

    With `inputs`, factors and biases are those of least squares; otherwise the factors are those of the model, or 1.
    """
    size, found = config.head_size, dict(tensors)
    model = model_of(config, tensors)
    with torch.no_grad():
        weights = model.sharebert.layer_weights(pooler=False).of_layer(0)
    parts = (
        ("kept_heads", kept_heads, size, "attention_output", "kept_attention_scale"),
        ("kept_columns", kept_columns, 1, "output", "kept_inner_scale"),
    )
    cut = {
        "attention_output": ("query_bias", "key_bias", "value_bias"),
        "output": ("intermediate_bias",),
    }
    changes: dict[str, Any] = {}
    for key, kept, width, matrix_name, scale_name in parts:
        if kept is None:
            continue
        before = getattr(config, key)
        changes[key] = tuple(kept if before is None else (before[number] for number in kept))
        channels = torch.tensor([number * width + i for number in kept for i in range(width)])
        matrix = getattr(weights, matrix_name).double()
        scale = torch.ones(len(channels), dtype=torch.float64)
        if inputs is not None:
            scale = rescaled(inputs.products[matrix_name], matrix, channels)
        for layer in range(config.num_hidden_layers):
            for bias in cut[matrix_name]:
                name = f"{LAYERS}{layer}.{bias}"
                found[name] = found[name][channels].clone()
            if inputs is not None:
                mean = inputs.means[layer, matrix_name]
                lost = mean @ matrix - (mean[channels] * scale) @ matrix[channels]
                name = f"{LAYERS}{layer}.{matrix_name}_bias"
                found[name] = found[name] + lost.float()
        own = found.get(f"sharebert.{scale_name}")
        found[f"sharebert.{scale_name}"] = scale.float() if own is None else own[channels] * scale.float()
    pruned = dataclasses.replace(config, **changes)
    assert slices_of(pruned) is not None
    return pruned, found


def _kept(importance: Tensor, remove: int) -> list[int] | None:
    if not remove:
        return None
    return sorted(set(range(len(importance))) - set(least_important(importance, remove)))
