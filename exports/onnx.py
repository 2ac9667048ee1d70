"""A model as ONNX, from its dense form, for ONNX Runtime and whatever else reads ONNX.

Unlike the other exports this one is not streamed: torch's exporter holds the dense form several times.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from exports.cards import onnx_card
from exports.dense import DenseBert, check_fits, dense_tensors
from exports.dense_export import write_dense_files
from exports.export import new_export
from exports.shapes import without_weights
from sharebert.config import ShareBertError
from sharebert.heads import ShareBertForMaskedLM

FILE = "model.onnx"

OPSET = 20
"""The first that has Gelu as an operator of its own."""

ONE_FILE_BYTES = 1_900_000_000
"""Protocol buffers end at 2 GiB: above this, the weights go into a second file, `OUT.data`."""


def write_onnx_export(
    out: Path,
    model: ShareBertForMaskedLM,
    *,
    tokenizer: Path | None = None,
    sections: Mapping[str, str] | None = None,
) -> None:
    """Write a folder with `model.onnx`, its tokenizer, config and card, whole or not at all.

    Arguments as in `write_export`; raises as `write_onnx` does.
    """
    check_fits(model.config)
    with new_export(out) as folder:
        write_onnx(folder / FILE, model)
        write_dense_files(folder, model.config, tokenizer, onnx_card(model.config, sections or {}))


def write_onnx(out: Path, model: ShareBertForMaskedLM) -> None:
    """Write the dense form of `model` to the ONNX file `out`, with dynamic batch and length.

    Inputs, int64 [batch, length]: input_ids, attention_mask, token_type_ids. Outputs: last_hidden_state
    [batch, length, H], pooler_output [batch, H] (the tanh of the compact form's) and, with an MLM head, logits
    [batch, length, V].

    Raises ShareBertError: an MLM head without a dense form, or the packages `onnx` and `onnxscript` are missing.
    """
    try:
        import onnxscript  # noqa: F401 (torch.onnx imports it, and says less)
    except ImportError as error:
        raise ShareBertError("an ONNX export needs two more packages: pip install onnx onnxscript") from error
    with without_weights():
        dense = DenseBert(model.config)
    dense.load_state_dict(dict(dense_tensors(model)), assign=True)
    tokens = torch.zeros(2, min(8, model.config.max_position_embeddings), dtype=torch.int64)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=model.config.max_position_embeddings)
    outputs = ["last_hidden_state", "pooler_output", "logits"][: 2 if dense.cls is None else 3]
    with _without_chatter():
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
def _without_chatter() -> Iterator[None]:
    """torch's exporter warns of its own internals, and logs that torchvision is not there."""
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
    """A model whose output has no None, which the exporter does not know."""

    def __init__(self, dense: DenseBert) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for t in self.dense(input_ids, attention_mask, token_type_ids) if t is not None)
