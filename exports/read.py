"""Reading an export in the compact form: its value, its config, its model.

Folders that `save_pretrained` or `Trainer` of transformers wrote from such an export are read as well. They keep
`mlm_head` as it was in the export, whatever the model is, so that `architectures` tells what it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from exports.cards import sections_of
from exports.export import Export, model_of, tensor_shapes
from exports.files import CARD, CONFIG, TOKENIZER
from exports.kinds import CLASSIFIER_KEYS, Classifier, Kind, MaskedLM, classifier_of, pretrained_kind
from exports.weight_files import read_metadata, read_weights
from exports.weight_source import TensorWeights
from sharebert.config import ShareBertConfig, ShareBertError
from sharebert.heads import ShareBertForMaskedLM
from sharebert.packed import unpack_all
from sharebert.sparse import expand_sparse
from sharebert.stored import full_tensors
from sharebert_common.errors import BadInput

MODEL_KEYS = frozenset(field.name for field in dataclasses.fields(ShareBertConfig)) | {"model_type"}

WRITTEN_ANEW = frozenset(
    {
        "architectures",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "is_encoder_decoder",
        "output_hidden_states",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        *CLASSIFIER_KEYS,
    }
)
"""Keys of a `config.json` that transformers or an export's form writes, so that they are not kept."""

TYPO = 0.85
"""Likeness to a key of the model from which on an unknown key is taken for a typing error."""


def read_export(folder: Path) -> Export:
    """The export in `folder` as a value. Its weights are mapped from its files, after their checksums were verified.

    Raises BadInput, naming the file: something missing, damaged, or not of the config's shape.
    """
    folder = Path(folder)
    given = _read_config_file(folder / CONFIG, folder)
    tensors = read_weights(folder)  # in the order of their names
    other_keys = dict(given.other_keys)
    try:
        tensors = expand_sparse(other_keys.get("sparse") or (), tensors)
    except (ShareBertError, TypeError) as error:
        raise BadInput(f"{folder}: {error}") from error
    if packing := other_keys.pop("packing", None):
        try:
            tensors = unpack_all(packing, tensors)
        except (ShareBertError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(f"{folder}: {error}") from error
    kind = _kind_of(given, tensors, folder / CONFIG)
    if given.head_is_unknown:
        print(f"{folder}: {given.architecture}: the head is left out, the encoder is read", file=sys.stderr)
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("sharebert.")}
    shapes = tensor_shapes(given.config) | kind.further_shapes(given.config)
    if other_keys.get("trimmed") and tensors:
        tensors = full_tensors(shapes, tensors)
    order = list(shapes)
    ordered = {name: tensors.pop(name) for name in order if name in tensors}
    tokenizer, card = folder / TOKENIZER, folder / CARD
    export = Export(
        given.config,
        kind,
        TensorWeights(ordered | tensors),
        tokenizer=tokenizer if tokenizer.is_file() else None,
        card_sections=sections_of(card.read_text(encoding="utf-8")) if card.is_file() else {},
        provenance=read_metadata(folder),
        other_keys=other_keys,
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
    return model_of(export.config, export.weights.tensors)


def read_config(folder: Path) -> ShareBertConfig:
    """The config of the export in `folder`, or in a `config.json` itself. Raises BadInput, naming the file."""
    folder = Path(folder)
    return _read_config_file(folder if folder.is_file() else folder / CONFIG, folder).config


def sparse_names(folder: Path) -> list[str]:
    """Names of the tensors that the export in `folder` stores as sparse. Raises BadInput, naming the file."""
    folder = Path(folder)
    return list(_read_config_file(folder / CONFIG, folder).other_keys.get("sparse") or ())


class _ConfigFile(NamedTuple):
    values: dict[str, Any]
    config: ShareBertConfig
    other_keys: dict[str, Any]
    architecture: str
    """The class that transformers loads; empty where the file does not say."""

    @property
    def head_is_unknown(self) -> bool:
        """Whether the class has a head that an export cannot hold."""
        known = {f"ShareBert{kind.architecture}" for kind in (MaskedLM, Classifier)} | {"", "ShareBertModel"}
        return self.architecture not in known


def _read_config_file(path: Path, folder: Path) -> _ConfigFile:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; is {folder} an export?") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path}: not a mapping of keys to values")
    others = {
        key: value
        for key, value in values.items()
        if key not in MODEL_KEYS | WRITTEN_ANEW and not key.endswith("_token_id") and not key.startswith("_")
    }
    try:
        for key in others:
            for match in difflib.get_close_matches(key, MODEL_KEYS, n=1, cutoff=TYPO):
                raise BadInput(f"{key}: unknown key; did you mean '{match}'?")
        config = ShareBertConfig.from_dict({key: value for key, value in values.items() if key in MODEL_KEYS})
    except (BadInput, ShareBertError) as error:
        raise BadInput(f"{path}: {error}") from error
    architecture = str(next(iter(values.get("architectures") or [""])))
    if architecture and architecture != f"ShareBert{MaskedLM.architecture}":
        config = dataclasses.replace(config, mlm_head="none")
    return _ConfigFile(values, config, others, architecture)


def _kind_of(given: _ConfigFile, tensors: Mapping[str, Tensor], path: Path) -> Kind:
    if given.head_is_unknown or "classifier.bias" not in tensors:
        return pretrained_kind(given.config)
    try:
        return classifier_of(given.values, len(tensors["classifier.bias"]))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
