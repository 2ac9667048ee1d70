"""The ONNX form: an ONNX file of the dense form, for ONNX Runtime and other tools that read ONNX.

This form is not streamed: torch's exporter holds the dense model several times.

    EXPORT/model.onnx (model.onnx.data where large)  config.json (`megatron-bert`)  tokenizer.json
    tokenizer_config.json  README.md
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from exports.cards import onnx_card
from exports.dense import MODEL_TYPE, check_dense, write_dense_files
from exports.dense_model import DenseBert, dense_tensors
from exports.export import Export
from exports.meta_device import without_weights
from sharebert.heads import ShareBertForMaskedLM
from sharebert_common.errors import BadInput

FILE = "model.onnx"

OPSET = 20
"""The first that has Gelu as an operator."""

ONE_FILE_BYTES = 1_900_000_000
"""Protocol buffers end at 2 GiB: above this, the weights go into a second file, `model.onnx.data`."""


@dataclass(frozen=True)
class Onnx:
    """The dense form as ONNX, in fp32, with dynamic batch and length."""

    model_type: ClassVar[str] = MODEL_TYPE

    def check(self, export: Export) -> None:
        """See `Form.check`."""
        check_dense(export)
        _require_packages()

    def write(self, export: Export, folder: Path) -> None:
        """See `Form.write`."""
        with export.mapped_model(folder) as model:
            write_onnx(folder / FILE, model)
        write_dense_files(folder, export, onnx_card(export.config, export.kind, export.card_sections))


def _require_packages() -> None:
    try:
        import onnxscript  # noqa: F401 (torch.onnx imports it, and its own message is less clear)
    except ImportError as error:
        raise BadInput("an ONNX export needs two more packages: pip install onnx onnxscript") from error


def write_onnx(out: Path, model: ShareBertForMaskedLM) -> None:
    """Write the dense form of `model` to the ONNX file `out`, with dynamic batch and length.

    Inputs, int64 [batch, length]: input_ids, attention_mask, token_type_ids. Outputs: last_hidden_state
    [batch, length, H], pooler_output [batch, H] (the tanh of the compact form's) and, with an MLM head, logits
    [batch, length, V].

    Raises BadInput: an MLM head without a dense form, or the packages `onnx` and `onnxscript` are missing.
    """
    _require_packages()
    with without_weights():
        dense = DenseBert(model.config)
    dense.load_state_dict(dict(dense_tensors(model)), assign=True)
    tokens = torch.zeros(2, min(8, model.config.max_position_embeddings), dtype=torch.int64)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=model.config.max_position_embeddings)
    outputs = ["last_hidden_state", "pooler_output", "logits"][: 2 if dense.cls is None else 3]
    with _quiet():
        program = torch.onnx.export(
            _Tuple(dense).eval(),
            (tokens, torch.ones_like(tokens), torch.zeros_like(tokens)),
            input_names=["input_ids", "attention_mask", "token_type_ids"],
            output_names=outputs,
            dynamic_shapes=[{0: batch, 1: length}] * 3,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    size = sum(parameter.nbytes for parameter in dense.parameters())
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        program.save(Path(folder) / out.name, external_data=size > ONE_FILE_BYTES)
        for path in sorted(Path(folder).iterdir(), reverse=True):  # OUT.data before the OUT that refers to it
            path.replace(out.parent / path.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides torch's warnings about its exporter's internals, and its log line that torchvision is missing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Tuple(nn.Module):
    """A model whose output has no None, because the exporter does not accept it."""

    def __init__(self, dense: DenseBert) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in self.dense(input_ids, attention_mask, token_type_ids) if t is not None)
