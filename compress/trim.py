"""The step `trim`: fewer parameters, the same function.

With x̂ the output of a LayerNorm before its β, and all biases as in `sharebert.encoder.Layer`:

- β of the attention's norm adds β·W_q to every query, and so on: it folds into the query and value biases;
- softmax does not see the key bias: q·(k + c) adds the same number to all scores of a row;
- attention probabilities sum to 1, so the value bias adds b_v·W_o to the output: it folds into that bias;
- β of the feed-forward norm folds into the bias behind it;
- rows of W_all from which no matrix is cut do nothing, and the pooler's do nothing in masked language modelling.

Exact in evaluation. In training, dropout on attention probabilities makes their sum vary, so further training starts
from the same function but not with the same noise. All that is left out starts again at zero.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from compress.step import FromCompact, Source, Tools
from exports.compact import stored_weights
from exports.export import Export
from exports.forms import write_export
from exports.kinds import MaskedLM
from exports.read import load_model, read_export
from exports.weight_source import TensorWeights, all_tensors
from sharebert_common.recipe import STRICT


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Trim(FromCompact):
    """Leave out parameters that change no output: key and value biases, the layers' betas, unused rows of W_all."""

    NAME = "trim"

    keep_pooler: bool | None = None
    """Keep the pooler's rows of W_all. Without them the pooled output is 0, and fine-tuning by the pooler starts from
    there; none: keep them unless the model is a masked language model."""

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        export = read_export(source.folder)
        pooler = not isinstance(export.kind, MaskedLM) if self.keep_pooler is None else self.keep_pooler
        tensors = all_tensors(export.weights)
        tensors |= folded(source.folder, tensors)
        before = sum(tensor.numel() for tensor in tensors.values())
        keys = {**export.other_keys, "trimmed": True, "trimmed_pooler": pooler}
        trimmed = dataclasses.replace(export, weights=TensorWeights(tensors), other_keys=keys)
        write_export(trimmed, out)
        return {"parameters_before": before, "pooler_kept": pooler} | _kept(trimmed)


def _kept(export: Export) -> dict[str, Any]:
    stored = sum(torch.Size(spec.shape).numel() for spec in stored_weights(export).specs.values())
    return {"parameters_after": stored}


def folded(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The biases of all layers after the folds, computed in float64.

    They are in float32 where the export is in bf16 or fp16: rounded to bf16 they changed hidden states by 1e-3.

    Args:
        folder: the export, from which the generated matrices are made.
        tensors: all its tensors.
    """
    model = load_model(folder).sharebert.double()
    with torch.no_grad():
        layer_weights = model.layer_weights(pooler=False)
        changed: dict[str, Tensor] = {}
        for index, module in enumerate(model.layers):
            layer: Any = module
            weights = layer_weights.of_layer(index).written_out()
            beta, ffn_beta = layer.attention_norm.bias, layer.ffn_norm.bias
            value = layer.value_bias + beta @ weights.value
            new = {
                "query_bias": layer.query_bias + beta @ weights.query,
                "key_bias": torch.zeros_like(layer.key_bias),
                "value_bias": torch.zeros_like(layer.value_bias),
                "attention_output_bias": layer.attention_output_bias + value @ weights.attention_output,
                "intermediate_bias": layer.intermediate_bias + ffn_beta @ weights.intermediate,
                "attention_norm.bias": torch.zeros_like(beta),
                "ffn_norm.bias": torch.zeros_like(beta),
            }
            changed |= {f"sharebert.layers.{index}.{name}": value for name, value in new.items()}
    return {name: value.to(torch.promote_types(tensors[name].dtype, torch.float32)) for name, value in changed.items()}
