"""Step `dense`: a compact export → a dense one, the form that plain transformers loads as `megatron_bert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from compress.step import FormName, NeedsNoRows, Source, Tools
from exports.dense import Dense
from exports.forms import write_export
from exports.read import read_export
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ToDense(NeedsNoRows):
    """Writes every generated matrix out, in fp32, for steps that take a dense export."""

    def check(self, source: Source) -> None:
        """See `Step.check`."""
        self.result_form(source.form)
        Dense().check(read_export(source.folder))

    def result_form(self, source: FormName) -> FormName:
        """See `Step.result_form`."""
        if source != "compact":
            raise BadInput(f"dense: takes a compact export, this one is {source}")
        return "dense"

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        write_export(read_export(source.folder), out, Dense())
        return {"bytes": sum(path.stat().st_size for path in out.glob("*.safetensors"))}
