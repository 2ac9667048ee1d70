"""What kind of model a folder holds; what a Hugging Face architecture takes as input; its dropout rates."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exports.files import CONFIG
from sharebert_common.errors import BadInput


@dataclass(frozen=True)
class Inputs:
    """What the model takes."""

    positions: int | None
    """The most tokens in a row; None if the model has no limit."""
    token_types: int | None
    """Its token types; None if it has no embedding of token types."""
    arguments: frozenset[str]
    """The arguments of its `forward`."""

    @classmethod
    def of(cls, model: nn.Module, config: Any) -> Inputs:
        """The inputs of a model, which may be on the meta device: only shapes are read."""
        limit = getattr(config, "max_position_embeddings", None)
        positions = limit if isinstance(limit, int) and limit > 0 else None
        token_types = None
        for name, module in model.named_modules():
            if not isinstance(module, nn.Embedding):
                continue
            if name.endswith("position_embeddings") and module.padding_idx is not None:
                # RoBERTa and its relatives count positions from padding_idx + 1: of 514 they use 512.
                usable = module.num_embeddings - module.padding_idx - 1
                positions = min(positions or usable, usable)
            elif name.endswith("token_type_embeddings"):
                token_types = module.num_embeddings
        return cls(positions, token_types, frozenset(inspect.signature(model.forward).parameters))

    def usable(self, columns: dict[str, list[list[int]]], where: str) -> dict[str, list[list[int]]]:
        """The columns of a tokenizer's output that the model takes.

        A model with one token type gets none: a tokenizer may number the second text of a pair 1, which it does not
        have. Raises BadInput: a token type that a model with several does not have.
        """
        found = {name: values for name, values in columns.items() if name in self.arguments}
        if self.token_types is not None and "token_type_ids" in found:
            largest = max((max(row, default=0) for row in found["token_type_ids"]), default=0)
            if self.token_types == 1:
                del found["token_type_ids"]
            elif largest >= self.token_types:
                raise BadInput(
                    f"{where}: the tokenizer gives the token type {largest}, but the model has {self.token_types}: "
                    "this is another model's tokenizer"
                )
        return found


def read_model_type(folder: Path) -> str:
    """The `model_type` in a folder's config. Raises BadInput: there is no config, or it is not a model's."""
    return str(_read_config(folder)["model_type"])


def read_labels(folder: Path) -> list[str]:
    """The names of a classifier's labels in a folder's config, in the order of its scores; transformers leaves out
    LABEL_0 and LABEL_1. Raises BadInput as `read_model_type` does, and where they are not names by numbers."""
    names = _read_config(folder).get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    try:
        return [str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    except (AttributeError, ValueError) as error:
        raise BadInput(f"{folder / CONFIG}: id2label: not names of labels by their numbers") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise BadInput(f"{path}: missing; is {folder} an export or the folder of a Hugging Face model?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not readable as a model's config ({error})") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadInput(f"{path}: not a model's config: there is no 'model_type' in it")
    return config


def inputs_of(config: Any) -> Inputs:
    """The inputs of the sequence classifier that transformers has for a config; no weights are made."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        return Inputs.of(AutoModelForSequenceClassification.from_config(config), config)


def set_dropout(config: Any, dropout: float, where: str) -> None:
    """Set every dropout rate of a config.

    Their names differ: `hidden_dropout_prob` in BERT, `dropout` in DistilBERT, `mlp_dropout` in ModernBERT,
    `resid_pdrop` in GPT-2. LayerDrop, which drops whole layers, is left as it is.

    Raises BadInput: the config has none.
    """
    names = [
        name
        for name, value in config.to_dict().items()
        if "drop" in name
        and "layerdrop" not in name
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    ]
    if not names:
        raise BadInput(f"finetune.dropout: the config of {where} has no dropout rate to set; leave the key out")
    for name in names:
        setattr(config, name, dropout)
