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
from typing import Any, ClassVar

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

OPSETS = range(18, 23)
"""Versions of ONNX's operators that can be asked for: from the first that torch's exporter writes. From 23 on it
writes the operator Attention, and ONNX Runtime 1.31 refuses a mask of [batch, 1, 1, length] there."""

OPSET = 20
"""The first that has Gelu as an operator."""

ONE_FILE_BYTES = 1_900_000_000
"""Protocol buffers end at 2 GiB: above this, the weights go into a second file, `model.onnx.data`."""


@dataclass(frozen=True)
class Onnx:
    """The dense form as ONNX, in fp32, with dynamic batch and length."""

    opset: int = OPSET
    """Version of ONNX's operators; older runtimes need a lower one."""
    model_type: ClassVar[str] = MODEL_TYPE

    def check(self, export: Export) -> None:
        """See `Form.check`."""
        check_dense(export)
        if self.opset not in OPSETS:
            raise BadInput(f"opset: {self.opset} is not one of {OPSETS.start} to {OPSETS.stop - 1}")
        _require_packages()

    def write(self, export: Export, folder: Path) -> None:
        """See `Form.write`."""
        with export.mapped_model(folder) as model:
            write_onnx(folder / FILE, model, self.opset)
        write_dense_files(folder, export, onnx_card(export.config, export.kind, export.card_sections))


def _require_packages() -> None:
    try:
        import onnxscript  # noqa: F401 (torch.onnx imports it, and its own message is less clear)
    except ImportError as error:
        raise BadInput("an ONNX export needs two more packages: pip install onnx onnxscript") from error


def write_onnx(out: Path, model: ShareBertForMaskedLM, opset: int = OPSET) -> None:
    """Write the dense form of `model` to the ONNX file `out`, with dynamic batch and length.

    Inputs, int64 [batch, length]: input_ids, attention_mask, and token_type_ids, which may be left away (0 then).
    Outputs: last_hidden_state [batch, length, H], pooler_output [batch, H] (the tanh of the compact form's) and, with
    an MLM head, logits [batch, length, V].

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
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    _strip_metadata(program.model)
    _make_token_types_optional(program.model)
    _name_the_longest_input(program.model, model.config.max_position_embeddings)
    size = sum(parameter.nbytes for parameter in dense.parameters())
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        program.save(Path(folder) / out.name, external_data=size > ONE_FILE_BYTES)
        for path in sorted(Path(folder).iterdir(), reverse=True):  # OUT.data before the OUT that refers to it
            path.replace(out.parent / path.name)


def _strip_metadata(model: Any) -> None:
    """Remove the exporter's notes: stack traces with paths of this machine, as long as the graph itself."""
    graph = model.graph
    nodes = list(graph.all_nodes())
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in nodes for value in node.outputs)]
    for part in (model, graph, *nodes, *values):
        part.metadata_props.clear()
        part.doc_string = None


def _make_token_types_optional(model: Any) -> None:
    """Give `token_type_ids` a default, one 0 for all positions: an input that is an initializer as well has one."""
    import onnx_ir

    given = {value.name: value for value in model.graph.inputs}
    types = given["token_type_ids"]
    for node, place in tuple(types.uses()):
        if node.op_type == "Shape":  # the exporter takes batch and length from any of the inputs
            node.replace_input_with(place, given["input_ids"])
    sizes = ("types_batch", "types_length")  # those of the other inputs, or 1 and 1
    types.shape = onnx_ir.Shape(sizes)
    for lookup, _ in types.uses():
        for embedded in lookup.outputs:
            embedded.shape = onnx_ir.Shape((*sizes, embedded.shape[-1]))
    types.const_value = onnx_ir.tensor(torch.zeros(1, 1, dtype=torch.int64).numpy(), name=types.name)
    model.graph.register_initializer(types)


def _name_the_longest_input(model: Any, positions: int) -> None:
    """Name the nodes that fail for a longer input after its limit, because a runtime's message holds their name."""
    for node in model.graph.all_nodes():
        if node.op_type == "Gather" and node.inputs[0].name.endswith("position_embeddings.weight"):
            node.name = f"positions_longest_input_is_{positions}_tokens"
            for user, _ in node.outputs[0].uses():
                user.name = f"add_positions_longest_input_is_{positions}_tokens"


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
