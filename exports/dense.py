"""The dense form: a folder that plain transformers loads as a stock `megatron_bert`, with no remote code.

EXPORT/model.safetensors (index + files where large)  config.json (`megatron-bert`)  tokenizer.json
tokenizer_config.json  README.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from exports.cards import dense_card
from exports.dense_model import DenseBert, check_fits, dense_pieces, dense_shapes
from exports.export import BERT_KEYS, Export
from exports.files import CARD, CONFIG, write_json
from exports.kinds import Classifier
from exports.meta_device import without_weights
from exports.tensor_file import Spec
from exports.tokenizer import write_tokenizer
from exports.weight_files import read_weights, stream_weights
from sharebert.config import ShareBertConfig
from sharebert.heads import ShareBertForMaskedLM
from sharebert_common.errors import BadInput

MODEL_TYPE = "megatron-bert"

CHECK_ROWS, CHECK_TOKENS = 2, 64
"""Size of the batch on which the two forms are compared."""


@dataclass(frozen=True)
class Dense:
    """Every generated matrix written out."""

    dtype: torch.dtype = torch.float32
    """Of the tensors written; they are computed in float32 and rounded."""
    model_type: ClassVar[str] = MODEL_TYPE

    def check(self, export: Export) -> None:
        """See `Form.check`."""
        check_dense(export)

    def write(self, export: Export, folder: Path) -> None:
        """See `Form.write`. The weights are streamed: memory holds the generated matrices of one layer."""
        config = export.config
        specs = {name: Spec(self.dtype, shape) for name, shape in dense_shapes(config).items()}
        with export.mapped_model(folder) as model:
            stream_weights(folder, specs, dense_pieces(model), export.provenance)
            found = differences(model, mapped_dense(folder, config))
        write_dense_files(folder, export, dense_card(config, export.kind, found, export.card_sections))


def check_dense(export: Export) -> None:
    """Raise BadInput where the dense layout cannot hold `export`."""
    check_dense_config(export.config)
    if isinstance(export.kind, Classifier):
        raise BadInput(
            "a classifier has no dense form, because the pooler of megatron_bert ends in tanh and that of ShareBERT "
            "does not; export the encoder alone (--no-head), or keep the compact form"
        )


def check_dense_config(config: ShareBertConfig) -> None:
    """Raise BadInput where the dense layout cannot hold a model of this config."""
    check_fits(config)
    if config.attention_size != config.hidden_size:
        raise BadInput(
            f"{config.heads} of {config.num_attention_heads} heads are left, and megatron_bert needs "
            "heads · head size = hidden_size; export it as onnx, or keep the compact form"
        )


def write_dense_files(folder: Path, export: Export, card: str) -> None:
    """Write everything of a dense export but its weights into `folder`."""
    pad_token_id = 0 if export.tokenizer is None else write_tokenizer(folder, export.tokenizer, export.config)
    write_json(folder / CONFIG, _dense_config(export, pad_token_id))
    (folder / CARD).write_text(card, encoding="utf-8")


def read_dense(folder: Path, config: ShareBertConfig, labels: int = 0) -> DenseBert:
    """The dense model in `folder`, made from a model of `config`, in float32, in evaluation mode; with `labels` a
    classifier.

    Raises BadInput, naming the folder: something missing, damaged, or of another shape.
    """
    tensors = read_weights(folder)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != dense_shapes(config, labels):
        raise BadInput(f"{folder}: not the tensors of this model's dense form")
    with without_weights():
        model = DenseBert(config, labels)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def mapped_dense(folder: Path, config: ShareBertConfig) -> DenseBert:
    """Like `read_dense`, for a model of any size: weights stay on disk, and become float32 one module at a time."""
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


def _dense_config(export: Export, pad_token_id: int) -> dict[str, Any]:
    """The `config.json` of `megatron_bert`. Its decoder is a matrix of its own, not the input embedding."""
    used = {"num_attention_heads": export.config.heads, "intermediate_size": export.config.inner_size}
    kept = export.config.to_dict() | used
    return {
        "model_type": MODEL_TYPE,
        "architectures": [f"MegatronBert{export.kind.architecture}"],
        **{key: kept[key] for key in ("vocab_size", *BERT_KEYS)},
        "hidden_act": "gelu",
        "pad_token_id": pad_token_id,
        "tie_word_embeddings": False,
        **{key: value for key, value in export.kind.config_keys().items() if value is not None},
    }
