"""An export as a value: a model with all that goes with it, in memory or on disk, before it takes a form."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exports.kinds import Kind, pretrained_kind
from exports.meta_device import without_weights
from exports.tensor_file import Spec
from exports.weight_files import read_weights, write_weights
from exports.weight_source import SelectedWeights, TensorWeights, WeightSource
from sharebert.config import ShareBertConfig
from sharebert.heads import ShareBertForMaskedLM
from sharebert_common.errors import BadInput

BERT_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
    "initializer_range",
)
"""Keys of a `config.json` that mean the same for a ShareBERT, the authors' models and a BERT of transformers."""


@dataclass(frozen=True)
class Export:
    """A model, where its weights are read from, and what its files say about it.

    `read_export` gives one, a consolidation makes one, `write_export` writes one in any form. A step that compresses
    takes one and gives another.
    """

    config: ShareBertConfig
    kind: Kind
    weights: WeightSource
    """Its tensors, by the names of `tensor_shapes`."""
    tokenizer: Path | None = None
    """A `tokenizer.json`; None for an export without one."""
    card_sections: Mapping[str, str] = field(default_factory=dict)
    """What the model card says beside sizes and loading: heading → text in Markdown."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """What the metadata of the safetensors files says about where the weights come from."""
    other_keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `config.json` that nothing here reads; they are written again."""

    @classmethod
    def of_model(cls, model: ShareBertForMaskedLM, **more: Any) -> Export:
        """The export of a pretrained model in memory; `more` are further fields."""
        return cls(model.config, pretrained_kind(model.config), TensorWeights(model.state_dict()), **more)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the model has."""
        return tensor_shapes(self.config) | self.kind.further_shapes(self.config)

    def check(self, where: str) -> None:
        """Raise BadInput, naming `where`, unless the names and shapes of the weights are exactly the model's."""
        check_tensors(self.weights.specs, self.tensor_shapes(), where)

    def without_head(self) -> Export:
        """Its encoder alone."""
        config = dataclasses.replace(self.config, mlm_head="none")
        weights = SelectedWeights(self.weights, list(tensor_shapes(config)))
        return dataclasses.replace(self, config=config, kind=pretrained_kind(config), weights=weights)

    def with_model(self, config: ShareBertConfig, tensors: Mapping[str, Tensor]) -> Export:
        """It with another config and other tensors; a tensor of a name that it has already keeps its dtype."""
        specs = self.weights.specs
        typed = {name: tensor.to(specs[name].dtype) if name in specs else tensor for name, tensor in tensors.items()}
        return dataclasses.replace(self, config=config, weights=TensorWeights(typed))

    @contextmanager
    def mapped_model(self, near: Path) -> Iterator[ShareBertForMaskedLM]:
        """Its encoder and MLM head in fp32, in evaluation mode, for a model of any size.

        The weights are written to a temporary folder inside `near`, and mapped from there: they take disk for as
        long as the block lasts, and no memory.
        """
        names = list(tensor_shapes(self.config))
        with tempfile.TemporaryDirectory(dir=near, prefix=".weights.") as folder:
            write_weights(Path(folder), SelectedWeights(self.weights, names), self.provenance, torch.float32)
            yield model_of(self.config, read_weights(Path(folder)))


def model_of(config: ShareBertConfig, tensors: Mapping[str, Tensor]) -> ShareBertForMaskedLM:
    """The encoder and MLM head with their tensors in fp32, in evaluation mode; what is fp32 already is not copied.

    Other tensors, as a classifier's, are left out.
    """
    with without_weights():
        model = ShareBertForMaskedLM(config)
    model.load_state_dict({name: tensors[name].float() for name, _ in model.named_parameters()}, assign=True)
    return model.eval()


def tensor_shapes(config: ShareBertConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the encoder and the MLM head, in the order of an export's file."""
    with without_weights():
        model = ShareBertForMaskedLM(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_tensors(specs: Mapping[str, Spec], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise BadInput, naming `where`, unless names and shapes are exactly those expected."""
    missing, unknown = sorted(expected.keys() - specs.keys()), sorted(specs.keys() - expected.keys())
    if missing or unknown:
        parts = [f"{what} {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
                 for what, names in (("lacks", missing), ("has unknown", unknown)) if names]  # fmt: skip
        raise BadInput(f"{where}: not the tensors of the model in config.json: {' and '.join(parts)}")
    for name, shape in expected.items():
        if tuple(specs[name].shape) != shape:
            raise BadInput(
                f"{where}: '{name}' is {list(specs[name].shape)}, the model in config.json has {list(shape)}"
            )
