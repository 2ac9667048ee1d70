"""The step `low_rank`: the matrices that layers share as products of two small ones, by truncated SVD."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compress.calibrate import calibration_batches
from compress.low_rank.ranks import named_ranks
from compress.low_rank.svd import truncated
from compress.prune.structure import Inputs
from compress.step import FromCompact, Source, Tools, check_one_pair
from exports.export import Export
from exports.forms import write_export
from exports.read import load_model, read_export
from exports.weight_source import TensorWeights, whole
from sharebert.config import MATRICES, ShareBertConfig
from sharebert.heads import ShareBertForMaskedLM
from sharebert.shared_linear import LowRank
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

SHARING = "sharebert.sharing."

SOURCES = ("sharebert.factor_linear_all.", "sharebert.kept_", SHARING)
"""How the names begin of what only makes the matrices: W_all, the factors on what is left, the matrices themselves."""

INPUT_OF = {"key": "query", "value": "query"}
"""Matrices that are multiplied by the same as another one."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class LowRankStep(FromCompact):
    """Store each matrix that layers share as a product of two small ones; layers multiply by one after the other."""

    NAME = "low_rank"

    rank: Annotated[int, Field(ge=1)]
    """Rank of each product, below the hidden size; a matrix that is narrower after pruning gets its whole width."""
    ranks: dict[str, Annotated[int, Field(ge=1)]] = field(default_factory=dict)
    """Other ranks for some matrices, by a pattern of their names (query, key, value, attention_output, intermediate,
    output, pooler), as {value: 96} or {"*output": 96}; the first pattern that fits counts."""
    calibrated: bool = True
    """Take the product that is nearest on calibration rows; false: the one that is nearest to the matrix itself."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return self.calibrated

    def check_config(self, config: ShareBertConfig) -> None:
        """See `FromCompact.check_config`."""
        self.result_config(config)

    def result_config(self, config: ShareBertConfig) -> ShareBertConfig:
        """See `Step.result_config`."""
        return low_rank_config("low_rank", config, self.rank, self.ranks)

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        export, model = read_export(source.folder), load_model(source.folder)
        moments: dict[str, Tensor] = {}
        if self.calibrated:
            rows = calibration_batches(source, tools)
            moments = Inputs(model, rows).second_moments
        config = self.result_config(export.config)
        write_export(with_products(export, config, products(model, config, moments)), out)
        return rank_notes(config)


def low_rank_config(step: str, config: ShareBertConfig, rank: int, ranks: Mapping[str, int]) -> ShareBertConfig:
    """The config of the result; `ranks` by patterns.

    Raises BadInput, naming the step: layers share no matrices, or a rank is no lower one.
    """
    if config.sharing not in ("veps", "eps", "layers"):
        raise BadInput(f"{step}: takes a model whose layers share their matrices, this one has {config.sharing}")
    check_one_pair(step, config)
    if config.sharing == "eps":
        raise BadInput(f"{step}: takes sharing: veps or layers; with eps, E is the matrices")
    if rank >= config.hidden_size:
        raise BadInput(f"{step}.rank: {rank} is not below the hidden size, {config.hidden_size}")
    widths = {name: min(config.matrix_shape(name)) for name in MATRICES}
    named = named_ranks(step, widths, ranks, "this model")
    return dataclasses.replace(
        config,
        sharing="low_rank",
        rank=rank,
        ranks=named,
        intermediate_size=config.inner_size,  # the products are those of the columns that are left
        kept_columns=None,
    )


def rank_notes(config: ShareBertConfig) -> dict[str, Any]:
    """What the report says about the ranks of a result: the common one, and those that differ from it."""
    ranks = {name: config.rank_of(name) for name in MATRICES}
    others = {name: rank for name, rank in ranks.items() if rank != config.rank}
    return {"rank": config.rank} | ({"ranks": others} if others else {})


def products(model: ShareBertForMaskedLM, config: ShareBertConfig, moments: dict[str, Tensor]) -> dict[str, LowRank]:
    """The product of each matrix that layers share, and of the pooler's.

    Args:
        model: the source.
        config: of the result, which has the ranks.
        moments: as `Inputs` gives them, or none.
    """
    with torch.no_grad():
        made = model.sharebert.layer_weights()
        matrices: dict[str, Any] = {**made.of_layer(0).written_out()._asdict(), "pooler": made.pooler}
    return {
        name: truncated(matrix, config.rank_of(name), moments.get(INPUT_OF.get(name, name)))
        for name, matrix in matrices.items()
    }


def with_products(export: Export, config: ShareBertConfig, found: dict[str, LowRank]) -> Export:
    """The export with products in place of what its matrices were made from; `config` is that of the result."""
    tensors = {name: whole(export.weights, name) for name in export.weights.specs if not name.startswith(SOURCES)}
    for name, product in found.items():
        tensors |= {f"{SHARING}{name}_a": product.a, f"{SHARING}{name}_b": product.b}
    keys = dict(export.other_keys)
    if "sparse" in keys:
        keys["sparse"] = [name for name in keys["sparse"] if name in tensors]
    return dataclasses.replace(export, config=config, weights=TensorWeights(tensors), other_keys=keys)
