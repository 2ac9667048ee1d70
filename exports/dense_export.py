"""An export in the dense form: a folder that stock transformers loads, with no remote code.

DENSE/model.safetensors (index + files where large)  config.json (`megatron-bert`)  tokenizer.json
tokenizer_config.json  README.md
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exports.cards import dense_card
from exports.dense import MODEL_TYPE, DenseBert, check_fits, dense_pieces, dense_shapes
from exports.export import CARD, CONFIG, new_export, write_json, write_tokenizer
from exports.shapes import without_weights
from exports.weights import read_weights, stream_weights
from sharebert.config import ShareBertConfig, ShareBertError
from sharebert.heads import ShareBertForMaskedLM

CHECK_ROWS, CHECK_TOKENS = 2, 64
"""The batch on which the two forms are compared."""


def write_dense(
    out: Path,
    model: ShareBertForMaskedLM,
    *,
    tokenizer: Path | None = None,
    sections: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Write the dense form of `model`, whole or not at all, a tensor or a part of one at a time.

    Args:
        out: the folder to make.
        model: in float32; one that `read_export` gave is mapped from its file, so that memory holds only
            the generated matrices, of one layer.
        tokenizer, sections, metadata: as in `write_export`.
        dtype: of the tensors written; they are made in float32 and rounded.

    Returns:
        How much it differs from the compact form: see `differences`.

    Raises ShareBertError: an MLM head without a dense form, a tokenizer that does not fit, `out` is something else.
    """
    check_fits(model.config)
    specs = {name: (dtype, shape) for name, shape in dense_shapes(model.config).items()}
    with new_export(out) as folder:
        stream_weights(folder, specs, dense_pieces(model), metadata)
        found = differences(model, mapped_dense(folder, model.config))
        write_dense_files(folder, model.config, tokenizer, dense_card(model.config, found, sections or {}))
    return found


def write_dense_files(folder: Path, config: ShareBertConfig, tokenizer: Path | None, card: str) -> None:
    """Write everything of a dense export but its weights into `folder`."""
    pad_token_id = 0 if tokenizer is None else write_tokenizer(folder, tokenizer, config)
    write_json(folder / CONFIG, _dense_config(config, pad_token_id))
    (folder / CARD).write_text(card, encoding="utf-8")


def read_dense(folder: Path, config: ShareBertConfig) -> DenseBert:
    """The dense model in `folder`, made from a model of `config`, in float32, in evaluation mode.

    Raises ShareBertError, naming the folder: something missing, damaged, or of another shape.
    """
    tensors = read_weights(folder)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != dense_shapes(config):
        raise ShareBertError(f"{folder}: not the tensors of this model's dense form")
    with without_weights():
        model = DenseBert(config)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def mapped_dense(folder: Path, config: ShareBertConfig) -> DenseBert:
    """As `read_dense`, for a model of any size: weights stay on disk, and become float32 one module at a time."""
    tensors = read_weights(folder)
    with without_weights():
        model = DenseBert(config).eval()

    def take(module: nn.Module, *_: Any) -> None:
        for name in list(module._parameters):
            module._parameters[name] = nn.Parameter(tensors[f"{prefixes[module]}.{name}"].float(), requires_grad=False)

    def drop(module: nn.Module, *_: Any) -> None:
        for name, parameter in list(module._parameters.items()):
            assert parameter is not None
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    prefixes = {module: name for name, module in model.named_modules()}
    for module in prefixes:
        if not any(True for _ in module.children()):
            module.register_forward_pre_hook(take)
            module.register_forward_hook(drop)
    return model


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
