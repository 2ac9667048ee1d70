"""Step `onnx_int8`: the products of an ONNX model in int8, by ONNX Runtime's quantiser.

A matrix that layers share is quantised once. int8 weights are symmetric. Dynamic: activations are quantised when the
model runs, a scale for each call. Static: a scale for each place, from calibration rows.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from compress.dense.runtime import batches
from compress.dense.smooth import smooth
from compress.source import copy_model, pad_id
from compress.step import FormName, NeedsNoRows, Source, Tools
from exports.onnx import FILE
from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

TRANSPOSED = ".transposed"
"""What the name of a stored matrix is followed by in the name of its copy that is written out transposed."""

QUANTISED = ("MatMul", "Gemm", "Gather")
"""Operators that take int8 weights: products, and the lookups of embeddings."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class OnnxInt8(NeedsNoRows):
    """Products in int8, for speed on a CPU."""

    mode: Literal["dynamic", "static"] = "dynamic"
    """Whether scales of activations are computed when the model runs, or once from calibration rows."""
    per_channel: bool = True
    """Whether each output channel of a matrix has a scale of its own."""
    reduce_range: bool = False
    """Whether weights use 7 bits. Processors without VNNI need it, because their sums of 16 bits overflow."""
    keep_fp32: tuple[str, ...] = ()
    """Patterns of nodes that stay in fp32, as `bert.encoder.layer.*.output.dense`."""
    smooth: Annotated[float, Field(ge=0, le=1)] | None = None
    """SmoothQuant's α, by which large activations behind a LayerNorm are moved into the matrices; none by default."""
    max_loss_increase: Annotated[float, Field(gt=0)] | None = None
    """The masked-LM loss may rise by this part of itself (0.01 is 1 %). If it rises more, the products that do the most
    harm stay in fp32, one kind after another."""
    calibration_rows: Annotated[int, Field(ge=1)] = 64
    """Rows of calibration data that `static` and `smooth` look at."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return self.mode == "static" or self.smooth is not None

    @property
    def needs_validation(self) -> bool:
        """See `Step.needs_validation`."""
        return self.max_loss_increase is not None

    def check(self, source: Source) -> None:
        """See `Step.check`."""
        self.check_ahead(source.form, None)
        import onnx

        try:
            graph = onnx.load(source.folder / FILE, load_external_data=False).graph
        except Exception as error:  # of protobuf, whose classes differ by version
            raise BadInput(f"{source.folder / FILE}: not readable as an ONNX file") from error
        if any("QuantizeLinear" in node.op_type or node.op_type.endswith("Integer") for node in graph.node):
            raise BadInput(f"onnx_int8: {source.folder} is quantised already")

    def check_ahead(self, form: FormName, config: ShareBertConfig | None) -> None:
        """See `Step.check_ahead`."""
        self.result_form(form)
        try:
            import onnxruntime.quantization  # noqa: F401
        except ImportError as error:
            raise BadInput("onnx_int8 needs two more packages: pip install onnx onnxruntime") from error

    def result_form(self, source: FormName) -> FormName:
        """See `Step.result_form`."""
        if source != "onnx":
            raise BadInput(f"onnx_int8: takes an ONNX folder, this one is {source}; put the step `onnx` before it")
        return "onnx"

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        copy_model(source.folder, out, "model.onnx*")
        full = source.folder / FILE
        said: dict[str, Any] = {}
        rows = tools.calibration()[: self.calibration_rows] if self.needs_calibration else None
        inputs = [] if rows is None else list(batches(rows, pad_id(source.folder)))
        if self.smooth is not None:
            smoothed = tools.scratch / "smoothed.onnx"
            said["smoothed_norms"] = smooth(full, smoothed, inputs, self.smooth)
            full = smoothed
        kept = list(self.keep_fp32)
        self.write(full, out / FILE, kept, inputs)
        if self.max_loss_increase is not None:
            limit = tools.masked_lm_loss(source.folder) * (1 + self.max_loss_increase)
            said["search"] = self._search(full, out, kept, inputs, limit, tools)
        return {**said, "kept_fp32": kept, "bytes": (out / FILE).stat().st_size}

    def write(self, full: Path, out: Path, kept: Sequence[str] = (), inputs: Sequence[dict[str, Any]] = ()) -> None:
        """Write the ONNX file `full` in int8 to `out`; nodes that match a pattern of `kept` stay in fp32.

        `inputs` are a session's inputs for calibration, which `static` needs. Raises BadInput: a pattern matches none.
        """
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

        names = nodes_with_weights(full)
        excluded = []
        for pattern in kept:
            found = [name for name in names if fnmatchcase(name, pattern)]
            if not found:
                raise BadInput(f"keep_fp32: no product or lookup of the model has a name like '{pattern}'")
            excluded += found
        options: dict[str, Any] = {
            "op_types_to_quantize": list(QUANTISED),
            "per_channel": self.per_channel,
            "reduce_range": self.reduce_range,
            "nodes_to_exclude": excluded,
            "extra_options": {"MatMulConstBOnly": True},  # products of two activations, in attention, stay in fp32
        }
        with _quiet(), _without_transpositions(full, out) as full:
            if self.mode == "dynamic":
                quantize_dynamic(str(full), str(out), weight_type=QuantType.QInt8, **options)
                return

            class Reader(CalibrationDataReader):  # type: ignore[misc]
                def __init__(self) -> None:
                    self.left: Iterator[dict[str, Any]] = iter(inputs)

                def get_next(self) -> dict[str, Any] | None:
                    return next(self.left, None)

            quantize_static(str(full), str(out), Reader(), weight_type=QuantType.QInt8, **options)

    def _search(
        self, full: Path, out: Path, kept: list[str], inputs: Sequence[dict[str, Any]], limit: float, tools: Tools
    ) -> list[dict[str, Any]]:
        """Add to `kept` until the loss is at most `limit`. Returns the loss with each kind of product in fp32."""
        found: list[tuple[float, str]] = []
        if tools.masked_lm_loss(out) <= limit:
            return []
        for kind in sorted({kind_of(name) for name in nodes_with_weights(full)}):
            self.write(full, out / FILE, [*kept, kind], inputs)
            found.append((tools.masked_lm_loss(out), kind))
            tools.say(f"onnx_int8: with {kind} in fp32 the loss is {found[-1][0]:.4f}, the limit is {limit:.4f}")
        for _, kind in sorted(found):
            kept.append(kind)
            self.write(full, out / FILE, kept, inputs)
            if tools.masked_lm_loss(out) <= limit:
                break
        return [{"fp32": kind, "loss": loss} for loss, kind in found]


def kind_of(node: str) -> str:
    """The pattern for the node in every layer."""
    return re.sub(r"layer\.\d+\.", "layer.*.", node)


@contextmanager
def _without_transpositions(full: Path, out: Path) -> Iterator[Path]:
    """`full` where stored matrices are transposed, as E in a tied head: the quantiser sees only stored ones."""
    import onnx

    model = onnx.load(full)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = _transposed(model.graph)
    for node in found:
        value, name = onnx.numpy_helper.to_array(stored[node.input[0]]).T, node.input[0] + TRANSPOSED
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        model.graph.node.remove(node)
        for user in model.graph.node:
            user.input[:] = [name if given == node.output[0] else given for given in user.input]
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        if found:
            full = Path(folder) / "untransposed.onnx"
            onnx.save(model, full)
        yield full


def _transposed(graph: Any) -> list[Any]:
    """The nodes that transpose a stored matrix."""
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in matrices]


def nodes_with_weights(file: Path) -> list[str]:
    """The names of the products and lookups with a stored matrix."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer} | {node.output[0] for node in _transposed(graph)}
    return [
        node.name
        for node in graph.node
        if node.op_type in QUANTISED and node.input[0 if node.op_type == "Gather" else 1] in stored
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the quantiser's advice to run a preprocessing that this file does not need."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
