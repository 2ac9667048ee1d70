"""Import of the authors' checkpoints: a folder with `config.json` and `pytorch_model.bin` or one `.safetensors` file.

Their implementation is the public repository jchenghu/sharebert.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exports.export import BERT_KEYS, Export
from exports.files import CONFIG, TOKENIZER
from exports.forms import write_export
from exports.kinds import pretrained_kind
from exports.weight_files import read_safetensors
from exports.weight_source import TensorWeights
from sharebert.config import ShareBertConfig, ShareBertError
from sharebert_common.errors import BadInput

EMBEDDING = "bert.embeddings.word_embeddings.weight"
PAD_MULTIPLE = 8
"""They pad the vocabulary to a multiple of this, but not in their tiny models."""

NEVER_READ = frozenset({"cls.predictions.bias"})
"""Stored in their checkpoints, and not used by their forward pass."""

_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"bert\.embeddings\.(.+)", r"sharebert.\1"),
        (r"bert\.encoder\.FinalLayerNorm\.(.+)", r"sharebert.final_norm.\1"),
        (r"bert\.encoder\.layer\.(\d+)\.PreAttentionLayerNorm\.(.+)", r"sharebert.layers.\1.attention_norm.\2"),
        (r"bert\.encoder\.layer\.(\d+)\.PostAttentionLayerNorm\.(.+)", r"sharebert.layers.\1.ffn_norm.\2"),
        (r"bert\.encoder\.layer\.(\d+)\.block\.self\.(query|key|value)_bias", r"sharebert.layers.\1.\2_bias"),
        (r"bert\.encoder\.layer\.(\d+)\.block\.output\.bias", r"sharebert.layers.\1.attention_output_bias"),
        (r"bert\.encoder\.layer\.(\d+)\.(intermediate|output)\.bias", r"sharebert.layers.\1.\2_bias"),
        (r"bert\.pooler\.bias", "sharebert.pooler_bias"),
        (r"cls\.predictions\.transform\.dense_act\.dense\.(.+)", r"mlm_head.dense.\1"),
        (r"cls\.predictions\.transform\.LayerNorm\.(.+)", r"mlm_head.norm.\1"),
        (r"cls\.predictions\.decoder\.weight", "mlm_head.decoder.weight"),
    )
)

_FIXED = {"hidden_act": "gelu", "encoder_ln_mode": "pre-ln", "layernorm_embedding": False}
"""Keys of their config, with the only value that gives the model of the paper."""


def import_authors(folder: Path, out: Path) -> None:
    """Write the checkpoint in `folder` as an export in float32, which holds their fp16 tensors exactly.

    A `tokenizer.json` in `folder` goes along. No pickled code is run.

    Raises BadInput, naming the file: something missing, unreadable, or not the model of the paper.
    """
    folder = Path(folder)
    path = _checkpoint(folder)
    tensors = _renamed(_read(path), path)
    config = _config(folder / CONFIG, tensors)
    tokenizer = folder / TOKENIZER
    export = Export(
        config,
        pretrained_kind(config),
        TensorWeights({name: tensor.float() for name, tensor in tensors.items()}),
        tokenizer=tokenizer if tokenizer.is_file() else None,
        card_sections={"Origin": "Imported from a checkpoint of the authors' own implementation."},
    )
    export.check(str(path))
    write_export(export, out)


def _checkpoint(folder: Path) -> Path:
    """The one file of `folder` that holds the authors' tensors."""
    found = [path for path in sorted(folder.glob("*.safetensors")) if _holds_model(path)]
    pickled = folder / "pytorch_model.bin"
    if not found and pickled.is_file():
        return pickled
    if len(found) != 1:
        what = "more than one .safetensors file" if found else "neither pytorch_model.bin nor a .safetensors file"
        raise BadInput(f"{folder}: {what} with the authors' tensors; one is needed")
    return found[0]


def _holds_model(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return EMBEDDING in file.keys()  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not readable as safetensors ({error}): damaged, or cut short") from error


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).partition("\n")[0]
        raise BadInput(f"{path}: holds more than tensors, or is damaged; it is not run ({first})") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise BadInput(f"{path}: not readable as a PyTorch checkpoint ({error}): damaged, or cut short") from error
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise BadInput(f"{path}: not a mapping of names to tensors")
    return values


def _renamed(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        if name in NEVER_READ:
            continue
        ours = next((m.expand(to) for pattern, to in _RENAMES if (m := pattern.fullmatch(name))), None)
        if ours is None:
            raise BadInput(f"{path}: '{name}' is not a tensor of the authors' model")
        renamed[ours] = tensor
    if "sharebert.word_embeddings.weight" not in renamed:
        raise BadInput(f"{path}: lacks '{EMBEDDING}'")
    return renamed


def _config(path: Path, tensors: Mapping[str, Tensor]) -> ShareBertConfig:
    """Our config for theirs. V is taken from the embedding: their config may give the words before padding."""
    try:
        theirs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: missing") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from error
    for key, value in _FIXED.items():
        if theirs.get(key, value) != value:
            raise BadInput(f"{path}: {key}: {theirs[key]!r} is not supported; the model has {value!r}")
    rows, factor = tensors["sharebert.word_embeddings.weight"].shape
    words = theirs.get("vocab_size", rows)
    if not isinstance(words, int) or not 0 <= rows - words < PAD_MULTIPLE:
        raise BadInput(f"{path}: vocab_size: {words!r}, but the embedding has {rows} rows")
    try:
        return ShareBertConfig.from_dict(
            {key: theirs[key] for key in BERT_KEYS if key in theirs}
            | {
                "vocab_size": rows,
                "vocab_pad_multiple": PAD_MULTIPLE if rows % PAD_MULTIPLE == 0 else 1,
                "factor_size": factor,
                "sharing": "veps" if "sharebert.factor_linear_all.weight" in tensors else "eps",
                "mlm_head": "untied" if any(name.startswith("mlm_head.") for name in tensors) else "none",
                "attention_scale": "authors",
            }
        )
    except ShareBertError as error:
        raise BadInput(f"{path}: {error}") from error
