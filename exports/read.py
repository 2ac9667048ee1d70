"""Reading an export in the compact form: its value, its config, its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exports.cards import sections_of
from exports.export import Export, model_of, tensor_shapes
from exports.files import CARD, CONFIG, TOKENIZER
from exports.kinds import CLASSIFIER_KEYS, Kind, classifier_of, pretrained_kind
from exports.weight_files import read_metadata, read_weights
from exports.weight_source import TensorWeights
from sharebert.config import ShareBertConfig, ShareBertError
from sharebert.heads import ShareBertForMaskedLM
from sharebert_common.errors import BadInput

HUGGING_FACE_KEYS = frozenset(
    {
        "architectures",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "is_encoder_decoder",
        "output_hidden_states",
        "return_dict",
        "transformers_version",
        *CLASSIFIER_KEYS,
    }
)
"""Keys of a `config.json` saved by transformers that say nothing about the encoder and the MLM head."""


def read_export(folder: Path) -> Export:
    """The export in `folder` as a value. Its weights are mapped from its files, after their checksums were verified.

    Raises BadInput, naming the file: something missing, damaged, or not of the config's shape.
    """
    folder = Path(folder)
    values = _read_values(folder)
    config = _config_of(values, folder / CONFIG)
    tensors = read_weights(folder)  # in the order of their names
    kind = _kind_of(values, config, tensors, folder / CONFIG)
    order = [*tensor_shapes(config), *kind.further_shapes(config)]
    ordered = {name: tensors.pop(name) for name in order if name in tensors}
    tokenizer, card = folder / TOKENIZER, folder / CARD
    export = Export(
        config,
        kind,
        TensorWeights(ordered | tensors),
        tokenizer=tokenizer if tokenizer.is_file() else None,
        card_sections=sections_of(card.read_text(encoding="utf-8")) if card.is_file() else {},
        provenance=read_metadata(folder),
    )
    export.check(str(folder))
    return export


def load_model(folder: Path) -> ShareBertForMaskedLM:
    """The encoder and the MLM head of the export in `folder`, in float32, on the CPU, in evaluation mode.

    Raises BadInput, naming the file: something missing, damaged, or not of the config's shape.
    """
    export = read_export(folder)
    assert isinstance(export.weights, TensorWeights)
    for name, tensor in export.weights.tensors.items():
        if not tensor.is_floating_point():
            raise BadInput(f"{folder}: tensor '{name}' is {tensor.dtype}, not of a floating dtype")
    return model_of(export.config, {name: export.weights.tensors[name] for name in tensor_shapes(export.config)})


def read_config(folder: Path) -> ShareBertConfig:
    """The config of the export in `folder`, or in a `config.json` itself. Raises BadInput, naming the file."""
    folder = Path(folder)
    return _config_of(_read_values(folder), folder if folder.is_file() else folder / CONFIG)


def _read_values(folder: Path) -> dict[str, Any]:
    path = folder if folder.is_file() else folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; is {folder} an export?") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path}: not a mapping of keys to values")
    return values


def _config_of(values: dict[str, Any], path: Path) -> ShareBertConfig:
    ours = {
        key: value for key, value in values.items() if key not in HUGGING_FACE_KEYS and not key.endswith("_token_id")
    }
    try:
        return ShareBertConfig.from_dict(ours)
    except ShareBertError as error:
        raise BadInput(f"{path}: {error}") from error


def _kind_of(values: dict[str, Any], config: ShareBertConfig, tensors: dict[str, Any], path: Path) -> Kind:
    if "classifier.bias" not in tensors:
        return pretrained_kind(config)
    try:
        return classifier_of(values, len(tensors["classifier.bias"]))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
