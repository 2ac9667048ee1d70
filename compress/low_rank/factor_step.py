"""The step `lower_factor`: fewer columns of E, which are most of the bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from compress.low_rank.factor import basis, least_squares, mean_hessian
from compress.quantise.hessians import collect, of_embedding
from compress.source import pad_id
from compress.step import FromCompact, Source, Tools
from exports.forms import write_export
from exports.read import load_model, read_export
from exports.weight_source import all_tensors
from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

EMBEDDING, PROJECTION = "sharebert.word_embeddings.weight", "sharebert.factor_linear_all.weight"
EXPANSION = "sharebert.factor_expansion.weight"


@dataclass(config=STRICT, kw_only=True, frozen=True)
class LowerFactor(FromCompact):
    """Lower the factor size F: E becomes a product of two matrices, of which the large one has fewer columns."""

    NAME = "lower_factor"

    size: Annotated[int, Field(ge=1)]
    """Columns of E that stay, fewer than there are."""
    gauge: Literal["plain", "product", "hessians"] = "hessians"
    """What the truncated SVD is near to. plain: E itself; product: E·W_allᵀ, from which matrices are cut; hessians:
    whatever costs least on calibration rows."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return self.gauge == "hessians"

    def check_config(self, config: ShareBertConfig) -> None:
        """See `FromCompact.check_config`."""
        if config.sharing != "veps":
            raise BadInput(f"lower_factor: takes a model with sharing: veps, this one has {config.sharing}")
        if self.size >= config.factor_size:
            raise BadInput(f"lower_factor.size: {self.size} is not below the model's factor_size, {config.factor_size}")
        if self.gauge == "hessians" and config.altered:
            raise BadInput(
                "lower_factor.gauge: hessians takes a model that has all heads, columns and factors, and one "
                "feed-forward pair; use product, or lower the factor size first"
            )

    def result_config(self, config: ShareBertConfig) -> ShareBertConfig:
        """See `Step.result_config`."""
        return dataclasses.replace(config, factor_size=self.size, expanded_size=config.row_size)

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        export = read_export(source.folder)
        tensors = {name: tensor.float() for name, tensor in all_tensors(export.weights).items()}
        embedding, projection = tensors[EMBEDDING], tensors[PROJECTION].double()
        weights, metric = None, None
        if self.gauge == "hessians":
            model = load_model(source.folder)
            tokens = tools.calibration()
            statistics = collect(model, tokens, tokens != pad_id(source.folder))
            weights, metric = mean_hessian(of_embedding(model, statistics, tensors[PROJECTION]), len(embedding))
        elif self.gauge == "product":
            metric = projection.t() @ projection
        matrix = basis(embedding, self.size, weights, metric)
        lower = least_squares(embedding, matrix, metric)
        before = tensors.get(EXPANSION)  # of a factor size that was lowered before
        expansion = matrix.t() if before is None else before.double() @ matrix.t()
        changed = {EMBEDDING: lower, PROJECTION: projection @ matrix.t(), EXPANSION: expansion}
        tensors |= {name: tensor.float().contiguous() for name, tensor in changed.items()}
        keys = {key: value for key, value in export.other_keys.items() if key != "sparse"}  # no zeros are left
        write_export(
            dataclasses.replace(export.with_model(self.result_config(export.config), tensors), other_keys=keys), out
        )
        error = (lower @ matrix - embedding.double()).norm() / embedding.double().norm()
        return {"factor size": self.size, "relative error of E": round(float(error), 4)}
