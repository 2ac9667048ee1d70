"""The model of a train recipe: a size by name, the keys of config.json, or an export to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.shards.reader import Dataset
from exports.tokenizer import training_tokenizer_sha256
from sharebert import SIZES, ShareBertConfig, ShareBertError, ShareBertForMaskedLM, initialize
from sharebert_common.errors import BadInput, nearest

INITS = ("variance", "authors")
CHOICE_KEYS = ("size", "init", "init_from")


@dataclass(frozen=True)
class ModelChoice:
    """A resolved `model` of a train recipe."""

    config: ShareBertConfig
    init: str
    """How the weights start: `variance` or `authors`."""
    init_from: Path | None
    """An export whose weights are taken instead."""


def choose_model(settings: Mapping[str, Any], vocab_size: int, seq_len: int) -> ModelChoice:
    """Resolve the `model` of a recipe for a dataset.

    Args:
        settings: `size` (a name in SIZES), `init`, `init_from`, and any key of config.json, which wins.
        vocab_size: words of the dataset's tokenizer; the model's vocabulary where the settings give none.
        seq_len: of the dataset's rows; the model's positions where the settings give none.

    Raises BadInput: an unknown key or size, sizes that do not fit each other or the dataset.
    """
    values = {key: value for key, value in settings.items() if key not in CHOICE_KEYS}
    size, init = settings.get("size"), settings.get("init", INITS[0])
    if size is not None and size not in SIZES:
        raise BadInput(f"model.size: no size '{size}'{nearest(str(size), SIZES)} (sizes: {', '.join(SIZES)})")
    if init not in INITS:
        raise BadInput(f"model.init: '{init}' is none of {', '.join(INITS)}")
    init_from = Path(settings["init_from"]) if settings.get("init_from") else None
    try:
        base: dict[str, Any] = {"vocab_size": vocab_size, "max_position_embeddings": seq_len}
        if init_from is not None:
            from exports.read import read_config

            base = read_config(init_from).to_dict()
        config = ShareBertConfig.from_dict(base | SIZES.get(size or "", {}) | values)
    except (ShareBertError, BadInput) as error:
        raise BadInput(f"model: {error}") from error
    if config.mlm_head == "none":
        raise BadInput("model.mlm_head: none cannot be pretrained; use untied or tied")
    if config.vocab_size < vocab_size:
        raise BadInput(f"model.vocab_size: {config.vocab_size}, and the dataset's tokenizer has {vocab_size} words")
    if config.max_position_embeddings < seq_len:
        raise BadInput(
            f"model.max_position_embeddings: {config.max_position_embeddings}, "
            f"and the dataset's rows have {seq_len} tokens"
        )
    return ModelChoice(config, init, init_from)


def refuse_other_tokenizer(choice: ModelChoice, dataset: Dataset) -> None:
    """Raise BadInput where the export to go on from was trained with another tokenizer than the dataset's."""
    theirs = choice.init_from / "tokenizer.json" if choice.init_from else None
    if theirs is not None and theirs.is_file():  # an export need not have one
        found, ours = training_tokenizer_sha256(theirs), dataset.manifest["tokenizer_sha256"]
        if found != ours:
            raise BadInput(
                f"model.init_from: {theirs} has sha256 {found}, the tokenizer of {dataset.path} has {ours}: "
                "prepare the dataset with the export's tokenizer"
            )


def refuse_dropout_within_documents(choice: ModelChoice, within_documents: bool, device: torch.device) -> None:
    """Raise BadInput where attention within documents, which has no dropout on CUDA, is asked for with it there."""
    dropout = choice.config.attention_probs_dropout_prob
    if within_documents and dropout and device.type == "cuda":
        raise BadInput(
            f"model.attention_probs_dropout_prob: {dropout:g}, but on CUDA data.within_documents has no dropout "
            "on attention probabilities: set it to 0"
        )


def build_model(choice: ModelChoice, seed: int) -> ShareBertForMaskedLM:
    """The model with its first weights, the same on every rank.

    Raises BadInput where `init_from` is no export, or has another shape.
    """
    model = ShareBertForMaskedLM(choice.config)
    initialize(model, choice.init, seed)
    if choice.init_from is not None:
        _take_weights(model, choice.init_from)
    return model


def _take_weights(model: ShareBertForMaskedLM, export: Path) -> None:
    """Copy an export's weights. Where there are more positions here, those that the export lacks start new."""
    from exports.read import load_model

    try:
        source = dict(load_model(export).named_parameters())
    except BadInput as error:
        raise BadInput(f"model.init_from: {error}") from error
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            given = source.get(name)
            longer = name.endswith("position_embeddings.weight") and given is not None
            if given is None or (given.shape != parameter.shape and not (longer and len(given) <= len(parameter))):
                shape = None if given is None else list(given.shape)
                raise BadInput(
                    f"model.init_from: {export}: '{name}' is {shape}, this model has {list(parameter.shape)}"
                )
            parameter[: len(given)] = given
