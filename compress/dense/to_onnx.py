"""Step `onnx`: a model → an ONNX file in fp32, with one copy of what the layers of a compact export share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from compress.source import WEIGHTS, copy_model
from compress.step import FormName, NeedsNoRows, Source, Tools
from exports.onnx import FILE, OPSET, Onnx, check_onnx
from exports.read import read_export
from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ToOnnx(NeedsNoRows):
    """Writes the model as an ONNX file, in fp32. It takes the folder of any BERT-like encoder too."""

    opset: int = OPSET
    """The version of ONNX's operators, 18 to 22."""

    def check(self, source: Source) -> None:
        """See `Step.check`."""
        self.check_ahead(source.form, None)
        if source.form == "compact":
            read_export(source.folder)

    def check_ahead(self, form: FormName, config: ShareBertConfig | None) -> None:
        """See `Step.check_ahead`."""
        self.result_form(form)
        check_onnx(self.opset)

    def result_form(self, source: FormName) -> FormName:
        """See `Step.result_form`."""
        if source == "onnx":
            raise BadInput("onnx: this folder holds an ONNX file already")
        return "onnx"

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        out.mkdir(parents=True, exist_ok=True)
        if source.form == "compact":
            Onnx(self.opset).write(read_export(source.folder), out)
        else:
            from compress.dense.hub_onnx import write_hub_onnx

            copy_model(source.folder, out, *WEIGHTS)
            write_hub_onnx(source.folder, out / FILE, self.opset)
        return {"opset": self.opset, "bytes": (out / FILE).stat().st_size}
