"""Step `dense`: a compact export → a dense one, the form that plain transformers loads as `megatron_bert`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from compress.step import FormName, NeedsNoRows, Source, Tools
from exports.dense import Dense, check_dense_config
from exports.forms import write_export
from exports.read import read_export
from sharebert.config import COMPRESSED, ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ToDense(NeedsNoRows):
    """Writes every generated matrix out, in fp32, for steps that take a dense export."""

    def check(self, source: Source) -> None:
        """See `Step.check`."""
        self.result_form(source.form)
        Dense().check(read_export(source.folder))

    def check_ahead(self, form: FormName, config: ShareBertConfig | None) -> None:
        """See `Step.check_ahead`."""
        self.result_form(form)
        if config is not None:
            check_dense_config(config)

    def result_config(self, config: ShareBertConfig) -> ShareBertConfig:
        """See `Step.result_config`."""
        plain: dict[str, Any] = dict.fromkeys(COMPRESSED) | {"ffn_pairs": 1, "sharing": "none"}
        return dataclasses.replace(config, **plain, intermediate_size=config.inner_size)

    def result_form(self, source: FormName) -> FormName:
        """See `Step.result_form`."""
        if source != "compact":
            raise BadInput(f"dense: takes a compact export, this one is {source}")
        return "dense"

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        write_export(read_export(source.folder), out, Dense())
        return {"bytes": sum(path.stat().st_size for path in out.glob("*.safetensors"))}
