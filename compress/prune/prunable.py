"""What `prune_weights` asks of a model, and the answers of a compact export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from compress.calibrate import Batch, calibration_batches, hidden_states, objective
from compress.quantise.hessians import collect
from compress.quantise.step import EMBEDDING, error_costs, with_tensors
from compress.source import pad_id
from compress.step import Source, Tools
from exports.compact import stored_weights
from exports.export import Export, model_of
from exports.forms import write_export
from exports.packed import is_pruned
from exports.read import read_export
from exports.weight_source import TensorWeights, all_tensors, whole
from sharebert.heads import ShareBertForMaskedLM


class Prunable(Protocol):
    """A model, and its matrices that lose weights: float32 [rows, columns] by the names of its parameters."""

    embedding: str
    """The name of the word embeddings."""
    is_sparse: bool
    """Whether the file of the word embeddings is sparse, as this step writes it."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The matrices as the file holds them; of a trimmed W_all the last rows alone."""
        ...

    def with_weights(self, weights: dict[str, Tensor]) -> nn.Module:
        """The model with these matrices, in evaluation mode."""
        ...

    def batches(self, tools: Tools, rows_at_once: int) -> list[Batch]:
        """The calibration rows. Raises BadInput: a special token is missing."""
        ...

    def objective(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """The sum over rows of what gradients are taken of; see `calibrate.objective`."""
        ...

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What `movement` trains the pruned model on, a mean over rows: its loss at the masked words; of a classifier,
        at the labels that it gave before, and how far its states are from those before."""
        ...

    def costs(self, weights: dict[str, Tensor], tools: Tools) -> dict[str, Tensor]:
        """What a squared error of each number costs on calibration rows, of the shape of the matrices."""
        ...

    def write(self, weights: dict[str, Tensor], out: Path) -> None:
        """Write the model with these matrices into the new folder `out`."""
        ...


class PrunableCompact:
    """A compact export: E, W_all, and matrices that no embedding generates."""

    embedding = EMBEDDING

    def __init__(self, source: Source) -> None:
        self.source, self.export = source, read_export(source.folder)
        self.is_sparse = EMBEDDING in self.export.other_keys.get("sparse", ())

    @property
    def weights(self) -> dict[str, Tensor]:
        """See `Prunable.weights`."""
        kept = stored_weights(self.export)
        return {name: whole(kept, name).float().clone() for name in kept.specs if is_pruned(name)}

    def with_weights(self, weights: dict[str, Tensor]) -> ShareBertForMaskedLM:
        """See `Prunable.with_weights`."""
        changed = with_tensors(self.export, weights)
        assert isinstance(changed.weights, TensorWeights)
        return model_of(self.export.config, changed.weights.tensors)

    def batches(self, tools: Tools, rows_at_once: int) -> list[Batch]:
        """See `Prunable.batches`."""
        return calibration_batches(self.source, tools, rows_at_once)

    def objective(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """See `Prunable.objective`."""
        assert isinstance(model, ShareBertForMaskedLM)
        return objective(model, batch, hidden_states(model, batch), generator)

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Prunable.training_loss`."""
        return self.objective(model, batch, torch.Generator()) / len(batch.tokens)

    def costs(self, weights: dict[str, Tensor], tools: Tools) -> dict[str, Tensor]:
        """See `Prunable.costs`."""
        model = self.with_weights(weights)
        tokens = tools.calibration()
        statistics = collect(model, tokens, tokens != pad_id(self.source.folder))
        full = {name: model.get_parameter(name).detach() for name in weights}
        return {name: error_costs(name, len(tensor), model, statistics, full) for name, tensor in weights.items()}

    def write(self, weights: dict[str, Tensor], out: Path) -> None:
        """See `Prunable.write`."""
        write_export(sparse(self.export, weights), out)


def sparse(export: Export, weights: dict[str, Tensor]) -> Export:
    """The export with these weights, given as a trimmed export stores them, which its file will hold as sparse."""
    keys = {**export.other_keys, "sparse": sorted(weights)}
    tensors = all_tensors(with_tensors(export, weights).weights)
    return dataclasses.replace(export.with_model(export.config, tensors), other_keys=keys)
