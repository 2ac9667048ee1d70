"""The ONNX form: an ONNX file of the model, for ONNX Runtime and other tools that read ONNX.

The layers' matrices are written out, once for all layers. The input embedding and a tied head stay in their factors.
This form is not streamed: torch's exporter holds the model with a copy of the matrices for each layer.

    EXPORT/model.onnx (model.onnx.data where large)  config.json (`megatron-bert`)  tokenizer.json
    tokenizer_config.json  README.md
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from exports.cards import onnx_card
from exports.dense import MODEL_TYPE, write_dense_files
from exports.dense_model import DenseBert, encoder_tensors
from exports.export import Export
from exports.kinds import Classifier
from exports.meta_device import without_weights
from exports.onnx_graph import finish, quiet
from sharebert.config import ShareBertConfig
from sharebert.encoder import ShareBert
from sharebert.heads import ShareBertForMaskedLM
from sharebert_common.errors import BadInput

FILE = "model.onnx"

OPSETS = range(18, 23)
"""Versions of ONNX's operators that can be asked for: from the first that torch's exporter writes. From 23 on it
writes the operator Attention, and ONNX Runtime 1.31 refuses a mask of [batch, 1, 1, length] there."""

OPSET = 20
"""The first that has Gelu as an operator."""

LAYER = "bert.encoder.layer."
PRODUCTS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
"""Products of a layer, in the order in which they run: node `LAYER` + number + "." + name."""


@dataclass(frozen=True)
class Onnx:
    """The model as ONNX, in fp32, with dynamic batch and length."""

    opset: int = OPSET
    """Version of ONNX's operators; older runtimes need a lower one."""
    model_type: ClassVar[str] = MODEL_TYPE

    def check(self, export: Export) -> None:
        """See `Form.check`."""
        check_onnx(self.opset)

    def write(self, export: Export, folder: Path) -> None:
        """See `Form.write`."""
        with export.mapped_model(folder) as model:
            write_onnx(folder / FILE, model, self.opset, OnnxClassifier.of(export))
        write_dense_files(folder, export, onnx_card(export.config, export.kind, export.card_sections))


def check_onnx(opset: int) -> None:
    """Raise BadInput where ONNX files with operators of version `opset` cannot be written here."""
    if opset not in OPSETS:
        raise BadInput(f"opset: {opset} is not one of {OPSETS.start} to {OPSETS.stop - 1}")
    _require_packages()


def _require_packages() -> None:
    try:
        import onnxscript  # noqa: F401 (torch.onnx imports it, and its own message is less clear)
    except ImportError as error:
        raise BadInput("an ONNX export needs two more packages: pip install onnx onnxscript") from error


def write_onnx(
    out: Path, model: ShareBertForMaskedLM, opset: int = OPSET, classifier: OnnxClassifier | None = None
) -> None:
    """Write `model` to the ONNX file `out`, with dynamic batch and length.

    Inputs, int64 [batch, length]: input_ids, attention_mask, and token_type_ids, which may be left away (0 then).
    Outputs: last_hidden_state [batch, length, H], pooler_output [batch, H] (the tanh of the compact form's) and, with
    an MLM head, logits [batch, length, V]. With a classifier: logits [batch, labels] alone.

    Raises BadInput: the packages `onnx` and `onnxscript` are missing.
    """
    _require_packages()
    module = _Outputs(model, classifier)
    tokens = torch.zeros(2, min(8, model.config.max_position_embeddings), dtype=torch.int64)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=model.config.max_position_embeddings)
    outputs = ["last_hidden_state", "pooler_output", "logits"][: 2 if model.mlm_head is None else 3]
    with quiet():
        program = torch.onnx.export(
            module.eval(),
            (tokens, torch.ones_like(tokens), torch.zeros_like(tokens)),
            input_names=["input_ids", "attention_mask", "token_type_ids"],
            output_names=["logits"] if classifier else outputs,
            dynamic_shapes=[{0: batch, 1: length}] * 3,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    finish(
        program,
        lambda graph: _name_products(graph, model.config, classifier),
        model.config.max_position_embeddings,
        out,
    )


def _name_products(model: Any, config: ShareBertConfig, classifier: OnnxClassifier | None) -> None:
    """Name each product after its module, and its matrix too: the exporter numbers them.

    Tools that quantise take the names, to leave a product as it is. The nodes are in the order of the forward pass.
    """
    names = ["bert.embeddings.factor_expansion"] if config.expanded_size is not None else []
    names += ["bert.embeddings.factor_linear"] if config.sharing != "eps" else []
    names += [f"{LAYER}{number}.{name}" for number in range(config.num_hidden_layers) for name in PRODUCTS]
    if classifier is None or classifier.pooling == "pooler":
        names.append("bert.pooler.dense")
    if classifier is not None:
        names.append("classifier")
    elif config.mlm_head != "none":
        narrow = ["mlm_head.factor_expansion"] if config.mlm_head == "tied" and config.expanded_size is not None else []
        names += ["mlm_head.dense", *narrow, "mlm_head.decoder"]
    weights = model.graph.initializers
    products = [
        (node, matrix)
        for node in model.graph.all_nodes()
        if node.op_type in ("MatMul", "Gemm") and (matrix := _stored(node.inputs[1])).name in weights
    ]
    if len(products) != len(names):
        raise BadInput(
            "onnx: some matrices of the model are equal, as where all of their weights were removed, and PyTorch's "
            "exporter joins their products; prune with scope: matrix"
        )
    for name, (node, matrix) in zip(names, products, strict=True):
        node.name = name
        if matrix.name.startswith("val_"):
            matrix.name = f"{name}.weight"


def _stored(value: Any) -> Any:
    """The matrix behind a transposition: a tied head reads the word embeddings transposed."""
    producer = value.producer()
    return producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else value


class _Words(nn.Module):
    """The input embedding from its factors: written out, [V, H], it would be larger than everything else."""

    def __init__(self, encoder: ShareBert) -> None:
        super().__init__()
        self.factors = encoder.word_embeddings
        projected = encoder.config.sharing != "eps"
        norm = encoder.pos_factor_norm
        parts = [encoder.pre_factor_norm, encoder.factor_linear, norm] if projected else [norm]
        expansion = [] if encoder.factor_expansion is None else [encoder.factor_expansion]
        self.rest = nn.Sequential(*expansion, *parts)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rest(self.factors(tokens))  # type: ignore[no-any-return]


class _Outputs(nn.Module):
    """The dense encoder with the factors of the input embedding, and the outputs of the file."""

    def __init__(self, model: ShareBertForMaskedLM, classifier: OnnxClassifier | None) -> None:
        super().__init__()
        encoder = model.sharebert
        with without_weights():
            self.encoder = DenseBert(dataclasses.replace(model.config, mlm_head="none"))
        self.encoder.bert.embeddings.word_embeddings = nn.Identity()
        self.encoder.load_state_dict(dict(encoder_tensors(encoder)), assign=True)
        self.encoder.bert.embeddings.word_embeddings = _Words(encoder)
        self.mlm_head = model.mlm_head
        self.expansion = encoder.factor_expansion
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        hidden, pooled, _ = self.encoder(input_ids, attention_mask, token_type_ids)
        if self.classifier is not None:
            return (self.classifier.scores(hidden, attention_mask, self.encoder.bert.pooler.dense),)
        if self.mlm_head is None:
            return hidden, pooled
        embedding = self.encoder.bert.embeddings.word_embeddings.factors.weight if self.mlm_head.tied else None
        return hidden, pooled, self.mlm_head(hidden, embedding, expansion=self.expansion)


@dataclass(frozen=True)
class OnnxClassifier:
    """The classifier of an export."""

    pooling: str
    weight: Tensor
    """[H, labels]."""
    bias: Tensor
    """[labels]."""

    @classmethod
    def of(cls, export: Export) -> OnnxClassifier | None:
        """That of `export`; None if it has none."""
        if not isinstance(export.kind, Classifier):
            return None
        shape = export.weights.specs["classifier.weight"].shape
        weight = export.weights.read("classifier.weight", 0, math.prod(shape)).view(shape)
        return cls(
            export.kind.pooling,
            weight.float().t().contiguous(),
            export.weights.read("classifier.bias", 0, shape[0]).float(),
        )

    def scores(self, hidden: Tensor, attention_mask: Tensor, pooler: nn.Module) -> Tensor:
        """The score of each label, [B, labels]; the pooled output has no tanh, as in the compact form."""
        if self.pooling == "mean":
            mask = attention_mask[:, :, None].to(hidden.dtype)
            text = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        else:
            text = pooler(hidden[:, 0])
        return text @ self.weight + self.bias  # F.linear would become a Gemm, which ONNX Runtime quantises wrongly
