"""An export in the dense form: a folder that stock transformers loads, with no remote code.

DENSE/model.safetensors (index + files where large)  config.json (`megatron-bert`)  tokenizer.json
tokenizer_config.json  README.md
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .card import dense_card
from .config import ShareBertConfig, ShareBertError
from .dense import MODEL_TYPE, DenseBert, check_fits, dense_shapes, dense_tensors
from .export import CARD, CONFIG, new_export, write_json, write_tokenizer
from .heads import ShareBertForMaskedLM
from .weights import read_weights, write_weights

CHECK_ROWS, CHECK_TOKENS = 2, 64
"""The batch on which the two forms are compared."""


def write_dense(
    out: Path,
    model: ShareBertForMaskedLM,
    *,
    tokenizer: Path | None = None,
    sections: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Write the dense form of `model`, whole or not at all; arguments as in `write_export`.

    Returns:
        How much it differs from the compact form: see `differences`.

    Raises ShareBertError: an MLM head without a dense form, a tokenizer that does not fit, `out` is something else.
    """
    check_fits(model.config)
    with new_export(out) as folder:
        write_weights(folder, dict(dense_tensors(model)), metadata)
        return write_dense_files(folder, model, tokenizer, sections)


def write_dense_files(
    folder: Path,
    model: ShareBertForMaskedLM,
    tokenizer: Path | None = None,
    sections: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Write everything but the tensors into `folder`, where the tensors already are; returns the `differences`."""
    pad_token_id = 0 if tokenizer is None else write_tokenizer(folder, tokenizer, model.config)
    write_json(folder / CONFIG, _dense_config(model.config, pad_token_id))
    found = differences(model, read_dense(folder, model.config))
    (folder / CARD).write_text(dense_card(model.config, found, sections or {}), encoding="utf-8")
    return found


def read_dense(folder: Path, config: ShareBertConfig) -> DenseBert:
    """The dense model in `folder`, made from a model of `config`, in float32, in evaluation mode.

    Raises ShareBertError, naming the folder: something missing, damaged, or of another shape.
    """
    tensors = read_weights(folder)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != dense_shapes(config):
        raise ShareBertError(f"{folder}: not the tensors of this model's dense form")
    with torch.device("meta"):
        model = DenseBert(config)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval()


@torch.inference_mode()
def differences(model: ShareBertForMaskedLM, dense: DenseBert) -> dict[str, float]:
    """max |dense − compact| / max |compact| of hidden states and logits, on a batch of random words with padding."""
    rows, length = CHECK_ROWS, min(CHECK_TOKENS, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[-1, length // 2 :] = 0
    was_training = model.training
    model.eval()
    try:
        output = dense(tokens, mask)
        found = {"hidden states": _difference(output.hidden, model.sharebert(tokens, mask, pool=False).hidden)}
        if output.logits is not None:
            found["logits"] = _difference(output.logits, model.logits(tokens, mask))
    finally:
        model.train(was_training)
    return found


def _difference(dense: Tensor, compact: Tensor) -> float:
    return ((dense - compact).abs().max() / compact.abs().max()).item()


def _dense_config(config: ShareBertConfig, pad_token_id: int) -> dict[str, Any]:
    """The `config.json` of `megatron_bert`. Its decoder is a matrix of its own, not the input embedding."""
    kept = config.to_dict()
    copied = (
        "vocab_size",
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
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MegatronBertModel" if config.mlm_head == "none" else "MegatronBertForMaskedLM"],
        **{key: kept[key] for key in copied},
        "hidden_act": "gelu",
        "pad_token_id": pad_token_id,
        "tie_word_embeddings": False,
    }
