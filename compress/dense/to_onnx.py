"""Step `onnx`: a compact export → an ONNX file in fp32, with one copy of what the layers share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from compress.step import FormName, Source, Tools
from exports.onnx import FILE, OPSET, Onnx
from exports.read import read_export
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ToOnnx:
    """Writes the model as an ONNX file, in fp32."""

    opset: int = OPSET
    """The version of ONNX's operators, 18 to 22."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return False

    @property
    def needs_validation(self) -> bool:
        """See `Step.needs_validation`."""
        return False

    def check(self, source: Source) -> None:
        """See `Step.check`."""
        self.result_form(source.form)
        Onnx(self.opset).check(read_export(source.folder))

    def result_form(self, source: FormName) -> FormName:
        """See `Step.result_form`."""
        if source != "compact":
            raise BadInput(f"onnx: takes a compact export, this one is {source}")
        return "onnx"

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        out.mkdir(parents=True, exist_ok=True)
        Onnx(self.opset).write(read_export(source.folder), out)
        return {"opset": self.opset, "bytes": (out / FILE).stat().st_size}
