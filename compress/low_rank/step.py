"""The step `low_rank`: the matrices that layers share as products of two small ones, by truncated SVD."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compress.low_rank.svd import truncated
from compress.prune.calibrate import calibration_batches
from compress.prune.structure import Inputs
from compress.step import FromCompact, Source, Tools, check_one_pair
from exports.export import Export
from exports.forms import write_export
from exports.read import load_model, read_export
from exports.weight_source import TensorWeights, whole
from sharebert.config import ShareBertConfig
from sharebert.heads import ShareBertForMaskedLM
from sharebert.shared_linear import LowRank
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

SHARING = "sharebert.sharing."

INPUT_OF = {"key": "query", "value": "query"}
"""Matrices that are multiplied by the same as another one."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class LowRankStep(FromCompact):
    """Store each matrix that layers share as a product of two small ones; layers multiply by one after the other."""

    NAME = "low_rank"

    rank: Annotated[int, Field(ge=1)]
    """Rank of each product, below the hidden size."""
    calibrated: bool = True
    """Take the product that is nearest on calibration rows; false: the one that is nearest to the matrix itself."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return self.calibrated

    def check_config(self, config: ShareBertConfig) -> None:
        """See `FromCompact.check_config`."""
        check_source("low_rank", config, self.rank)

    def result_config(self, config: ShareBertConfig) -> ShareBertConfig:
        """See `Step.result_config`."""
        return low_rank_config(config, self.rank)

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        export, model = read_export(source.folder), load_model(source.folder)
        moments: dict[str, Tensor] = {}
        if self.calibrated:
            rows = calibration_batches(source, tools)
            moments = Inputs(model, rows).second_moments
        found = products(model, self.rank, moments)
        write_export(with_products(export, self.rank, found), out)
        return {"rank": self.rank}


def check_source(step: str, config: ShareBertConfig, rank: int) -> None:
    """Raise BadInput where layers share no matrices, or where the rank is no lower one."""
    if config.sharing not in ("veps", "eps", "layers"):
        raise BadInput(f"{step}: takes a model whose layers share their matrices, this one has {config.sharing}")
    if config.kept_heads is not None or config.kept_columns is not None:
        raise BadInput(f"{step}: takes a model with all heads and columns")
    check_one_pair(step, config)
    if config.sharing == "eps":
        raise BadInput(f"{step}: takes sharing: veps or layers; with eps, E is the matrices")
    if rank >= config.hidden_size:
        raise BadInput(f"{step}.rank: {rank} is not below the hidden size, {config.hidden_size}")


def low_rank_config(config: ShareBertConfig, rank: int) -> ShareBertConfig:
    """The config of a model with products in place of its matrices."""
    return dataclasses.replace(config, sharing="low_rank", rank=rank)


def products(model: ShareBertForMaskedLM, rank: int, moments: dict[str, Tensor]) -> dict[str, LowRank]:
    """The product of each matrix that layers share, and of the pooler's; `moments` as `Inputs` gives them, or none."""
    with torch.no_grad():
        made = model.sharebert.layer_weights()
        matrices: dict[str, Any] = {**made.of_layer(0).written_out()._asdict(), "pooler": made.pooler}
    return {name: truncated(matrix, rank, moments.get(INPUT_OF.get(name, name))) for name, matrix in matrices.items()}


def with_products(export: Export, rank: int, found: dict[str, LowRank]) -> Export:
    """The export with products in place of what its matrices were made from."""
    dropped = ("sharebert.factor_linear_all.", SHARING)
    tensors = {name: whole(export.weights, name) for name in export.weights.specs if not name.startswith(dropped)}
    for name, product in found.items():
        tensors |= {f"{SHARING}{name}_a": product.a, f"{SHARING}{name}_b": product.b}
    config = low_rank_config(export.config, rank)
    keys = dict(export.other_keys)
    if "sparse" in keys:
        keys["sparse"] = [name for name in keys["sparse"] if name in tensors]
    return dataclasses.replace(export, config=config, weights=TensorWeights(tensors), other_keys=keys)
