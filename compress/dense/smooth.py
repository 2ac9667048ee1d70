"""SmoothQuant through the norms: large activations are moved into the matrices that read them, exactly.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023,
equation 4: s = max|X|^α / max|W|^(1-α) for each input channel; X/s and s·W have the same product, and 1/s goes into
gamma and beta of the LayerNorm that makes X. Layers that share matrices get one s, from the maxima over all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sharebert_common.errors import BadInput

SMALLEST = 1e-5
"""A channel's scale is at least this, as in the authors' code."""


def smooth(source: Path, out: Path, inputs: Iterable[dict[str, Any]], alpha: float) -> int:
    """Write the smoothed model of the ONNX file `source` to `out`; `inputs` are a session's calibration inputs.

    A LayerNorm whose output something else than a product reads, as the residual stream of a post-LN model, stays as
    it is. Returns how many LayerNorms were changed. Raises BadInput where that would be none.
    """
    import onnx

    model = onnx.load(source)
    groups = _groups(model.graph)
    if not groups:
        raise BadInput(
            "onnx_int8.smooth: no LayerNorm of this model is read by products alone, as in a post-LN model such as "
            "BERT; leave smooth out"
        )
    largest = _largest(source, [norm.output[0] for norms, _ in groups for norm in norms], inputs)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    changed = 0
    for norms, matrices in groups:
        x = np.max([largest[norm.output[0]] for norm in norms], axis=0)
        w = np.max([np.abs(onnx.numpy_helper.to_array(stored[name])).max(axis=1) for name in matrices], axis=0)
        scale = scales(x, w, alpha)
        for name in matrices:
            value = onnx.numpy_helper.to_array(stored[name]) * scale[:, None]
            stored[name].CopyFrom(onnx.numpy_helper.from_array(value, name))
        for norm in norms:
            changed += 1
            for place, suffix in ((1, "weight"), (2, "bias")):  # under new names: norms may share equal values
                value = onnx.numpy_helper.to_array(stored[norm.input[place]]) / scale
                norm.input[place] = f"{norm.name}.smoothed.{suffix}"
                model.graph.initializer.append(onnx.numpy_helper.from_array(value, norm.input[place]))
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)
    onnx.save(model, out)
    return changed


def scales(x: np.ndarray, w: np.ndarray, alpha: float) -> np.ndarray:
    """s of each input channel, from the largest |X| and |W| of each, float32."""
    x, w = np.maximum(x, SMALLEST), np.maximum(w, SMALLEST)
    return np.maximum(x**alpha / w ** (1 - alpha), SMALLEST).astype(np.float32)


def _groups(graph: Any) -> list[tuple[list[Any], tuple[str, ...]]]:
    """LayerNorms with the matrices that read them; norms whose matrices are the same ones are in one group."""
    stored = {tensor.name for tensor in graph.initializer}
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    outputs = {value.name for value in graph.output}
    found: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for norm in graph.node:
        if norm.op_type != "LayerNormalization" or norm.output[0] in outputs or len(norm.input) < 3:
            continue
        products = readers[norm.output[0]]
        if products and all(node.op_type == "MatMul" and node.input[1] in stored for node in products):
            found[tuple(sorted({node.input[1] for node in products}))].append(norm)
    groups = []
    for matrices, norms in found.items():
        inputs = {norm.output[0] for norm in norms}
        if all(node.input[0] in inputs for name in matrices for node in readers[name]):
            groups.append((norms, matrices))
    return groups


def _largest(source: Path, names: list[str], inputs: Iterable[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The largest |value| of each channel of the named values, over real tokens."""
    import onnx
    import onnxruntime

    model = onnx.load(source)
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[str, np.ndarray] = {}
    for given in inputs:
        real = given["attention_mask"] != 0
        for name, value in zip(names, session.run(names, given), strict=True):
            here = np.abs(value[real]).max(axis=0)
            found[name] = np.maximum(found[name], here) if name in found else here
    return found
