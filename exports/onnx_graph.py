"""What an ONNX graph of an encoder needs after torch's exporter made it, and how it is written."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sharebert_common.files import make_folders

ONE_FILE_BYTES = 1_900_000_000
"""Protocol buffers end at 2 GiB: above this, the weights go into a second file, `model.onnx.data`."""


def save(program: Any, out: Path) -> None:
    """Write what `torch.onnx.export` returned to the file `out`, whole or not at all."""
    stored = [value.const_value for value in program.model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in stored if tensor is not None)
    make_folders(out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        program.save(Path(folder) / out.name, external_data=size > ONE_FILE_BYTES)
        for path in sorted(Path(folder).iterdir(), reverse=True):  # OUT.data before the OUT that refers to it
            path.replace(out.parent / path.name)


def finish(program: Any, name_products: Callable[[Any], None], positions: int | None, out: Path) -> None:
    """Make the exporter's graph what runtimes and quantisers expect, and write it to `out`.

    Args:
        program: what torch's exporter made.
        name_products: gives tensors and products the names of a checkpoint, in place.
        positions: tokens of the longest input; None where the model has no such limit.
        out: the file; a large model has a second one beside it.
    """
    model = program.model
    strip_metadata(model)
    name_products(model)
    share_equal_weights(model)
    if any(value.name == "token_type_ids" for value in model.graph.inputs):
        make_token_types_optional(model)
    if positions is not None:
        name_the_longest_input(model, positions)
    save(program, out)


def strip_metadata(model: Any) -> None:
    """Remove the exporter's notes: stack traces with paths of this machine, as long as the graph itself."""
    graph = model.graph
    nodes = list(graph.all_nodes())
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in nodes for value in node.outputs)]
    for part in (model, graph, *nodes, *values):
        part.metadata_props.clear()
        part.doc_string = None


def share_equal_weights(model: Any) -> None:
    """Keep one copy of equal weights: the layers of a ShareBERT use the same matrices, and the exporter writes one for
    each layer. Tools that quantise then quantise it once."""
    from onnx_ir.passes.common import DeduplicateInitializersPass

    DeduplicateInitializersPass(size_limit=1 << 62)(model)


def make_token_types_optional(model: Any) -> None:
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


def name_the_longest_input(model: Any, positions: int) -> None:
    """Name the nodes that fail for a longer input after its limit, because a runtime's message holds their name."""
    for node in model.graph.all_nodes():
        if node.op_type == "Gather" and node.inputs[0].name.endswith("position_embeddings.weight"):
            node.name = f"positions_longest_input_is_{positions}_tokens"
            for user, _ in node.outputs[0].uses():
                user.name = f"add_positions_longest_input_is_{positions}_tokens"


@contextmanager
def quiet() -> Iterator[None]:
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
