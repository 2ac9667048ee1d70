"""Any BERT-like encoder that plain transformers loads → an ONNX file in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.source import is_classifier, is_masked_lm, open_hub_model
from exports.onnx_graph import finish, quiet
from scoring.architecture import Inputs
from sharebert_common.errors import BadInput


def write_hub_onnx(folder: Path, out: Path, opset: int) -> None:
    """Write the model in `folder` to the ONNX file `out`; see `write_model_onnx`.

    Raises BadInput, naming the folder: not loaded by transformers, or of an architecture that torch cannot export.
    """
    write_model_onnx(open_for_onnx(folder), folder, out, opset)


def head_of(folder: Path) -> str:
    """The head of the model in `folder`, as `open_hub_model` takes it; empty without a classifier or a
    masked-language-model head."""
    return "SequenceClassification" if is_classifier(folder) else "MaskedLM" if is_masked_lm(folder) else ""


def open_for_onnx(folder: Path) -> Any:
    """The model in `folder` with its head. Raises BadInput, naming the folder, where transformers cannot load it."""
    return open_hub_model(folder, head_of(folder), attn_implementation="eager")  # torch's exporter knows its operators


def write_model_onnx(model: Any, folder: Path, out: Path, opset: int) -> None:
    """Write a model to the ONNX file `out`, with dynamic batch and length. Changes the model.

    Inputs, int64 [batch, length]: input_ids, attention_mask and, where the model has an embedding of them,
    token_type_ids, which may be left away (0 then). Outputs: `logits` alone for a classifier; last_hidden_state and
    `logits` for a masked language model; else last_hidden_state and, where there is a pooler, pooler_output.

    Args:
        model: as `open_for_onnx` returns it; other modules may stand in the place of its layers.
        folder: where it came from.
        out: the file.
        opset: the version of ONNX's operators.

    Raises BadInput, naming the folder, where torch cannot export it.
    """
    head = head_of(folder)
    inputs = Inputs.of(model, model.config)
    names = ["input_ids", "attention_mask"]
    if inputs.token_types is not None and "token_type_ids" in inputs.arguments:
        names.append("token_type_ids")
    _write_products_out(model)
    module = _Outputs(model, head, names).eval()
    tokens = torch.full((2, 8), 5, dtype=torch.int64)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=inputs.positions)
    values = (tokens, torch.ones_like(tokens), torch.zeros_like(tokens))[: len(names)]
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                values,
                input_names=names,
                output_names=module.names(values),
                dynamic_shapes=(({0: batch, 1: length},) * len(names),),  # forward takes a variable number of tensors
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # each operator or guard that fails has a class of its own
        reason = str(error.__cause__ or error).splitlines()[0]
        raise BadInput(f"{folder}: torch cannot export this model to ONNX ({reason})") from error
    assert program is not None
    finish(program, _name_products, inputs.positions, out)


class _Product(nn.Module):
    """An nn.Linear as a product and a sum. Torch's exporter makes a Gemm of an nn.Linear with an input of two
    dimensions, and ONNX Runtime quantises a Gemm wrongly."""

    def __init__(self, linear: nn.Linear, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        self.weight = linear.weight if tied else nn.Parameter(linear.weight.detach().t().contiguous(), False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        y = x @ (self.weight.t() if self.tied else self.weight)
        return y if self.bias is None else y + self.bias


def _write_products_out(model: nn.Module) -> None:
    """Put a `_Product` in the place of every nn.Linear; one that is tied to an embedding goes on sharing it."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    made: dict[int, _Product] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.Linear):
            if id(module) not in made:
                made[id(module)] = _Product(module, id(module.weight) in embeddings)
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], made[id(module)])


class _Outputs(nn.Module):
    """The model with the outputs of the file."""

    def __init__(self, model: nn.Module, head: str, inputs: list[str]) -> None:
        super().__init__()
        self.model, self.head, self.inputs = model, head, inputs

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._outputs(values).values())

    def names(self, values: tuple[Tensor, ...]) -> list[str]:
        """The names of the outputs."""
        with torch.no_grad():
            return list(self._outputs(values))

    def _outputs(self, values: tuple[Tensor, ...]) -> dict[str, Tensor]:
        given: dict[str, Any] = dict(zip(self.inputs, values, strict=True))
        if not self.head:
            output = self.model(**given)
            found = {"last_hidden_state": output.last_hidden_state, "pooler_output": output.get("pooler_output")}
            return {name: value for name, value in found.items() if value is not None}
        output = self.model(**given, output_hidden_states=self.head == "MaskedLM")
        if self.head == "MaskedLM":
            return {"last_hidden_state": output.hidden_states[-1], "logits": output.logits}
        return {"logits": output.logits}


def _name_products(model: Any) -> None:
    """Name the stored tensors as in the checkpoint, and each product after its matrix."""
    for value in list(model.graph.initializers.values()):
        if value.name.startswith("model."):
            value.name = value.name.removeprefix("model.")
    seen: set[str] = set()
    for node in model.graph.all_nodes():
        if node.op_type != "MatMul":
            continue
        source = node.inputs[1]
        while source.producer() is not None and source.producer().op_type == "Transpose":
            source = source.producer().inputs[0]
        if source.name not in model.graph.initializers:
            continue
        name = source.name.removesuffix(".weight")
        node.name = f"{name}.decoder" if name in seen or source is not node.inputs[1] else name
        seen.add(node.name)
