"""What `prune_weights` asks of a dense export, or of an encoder of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.dense.hub_onnx import head_of
from compress.low_rank.encoder_loss import check_positions, encoder_objective, outputs, rows_of
from compress.low_rank.fading_linears import linears_of, watch_inputs
from compress.prune.calibrate import Batch
from compress.source import WEIGHTS, config_of, copy_model, open_hub_model
from compress.step import Tools
from exports.weight_files import read_metadata, read_weights, write_weights
from exports.weight_source import TensorWeights
from sharebert_common.errors import BadInput

ROWS_AT_ONCE = 32
"""Calibration rows that costs are collected on at once."""


class PrunableEncoder:
    """A model that stock transformers loads: its word embeddings, and each `nn.Linear` inside its layers."""

    def __init__(self, folder: Path) -> None:
        """Raises BadInput, naming the folder: quantised, without such matrices, or with other names in its file."""
        if "quantization_config" in config_of(folder):
            raise BadInput(f"prune_weights: {folder} is quantised; prune the model before")
        self.folder, self.head = folder, head_of(folder)
        self.model = open_hub_model(folder, self.head).requires_grad_(False)
        self.linears = {f"{name}.weight": linear for name, linear in linears_of(self.model).items()}
        if not self.linears:
            raise BadInput(f"prune_weights: {folder} has no linear layers inside a list of layers")
        words = self.model.get_input_embeddings().weight
        (self.embedding, *_) = [name for name, p in self.model.named_parameters() if p is words]
        self.stored = self._stored()

    def _stored(self) -> dict[str, str]:
        """The names of tensors in the file that hold pruned matrices, and those of the parameters."""
        pruned = {id(self.model.get_parameter(name)): name for name in self.names}
        tied = {name: pruned.get(id(p)) for name, p in self.model.named_parameters(remove_duplicate=False)}
        start = f"{self.model.base_model_prefix}."
        found = {}
        for name in read_weights(self.folder):
            for plain in (name, name.removeprefix(start), start + name):
                if ours := tied.get(plain):
                    found[name] = ours
        if missing := set(self.names) - set(found.values()):
            raise BadInput(
                f"prune_weights: {self.folder}: no tensor of its file has the name of {min(missing)}; load the model "
                "in transformers, and save it anew"
            )
        return found

    @property
    def names(self) -> list[str]:
        """The names of the parameters that lose weights."""
        return [self.embedding, *self.linears]

    @property
    def weights(self) -> dict[str, Tensor]:
        """See `Prunable.weights`."""
        return {name: self.model.get_parameter(name).detach().clone() for name in self.names}

    @torch.no_grad()
    def with_weights(self, weights: dict[str, Tensor]) -> nn.Module:
        """See `Prunable.with_weights`. It is always the same model."""
        for name, tensor in weights.items():
            self.model.get_parameter(name).copy_(tensor)
        return self.model  # type: ignore[no-any-return]

    def batches(self, tools: Tools, rows_at_once: int) -> list[Batch]:
        """See `Prunable.batches`."""
        check_positions(tools.calibration(), self.model, self.folder)
        return rows_of(tools.calibration(), self.folder, self.head, tools.seed, rows_at_once)

    def objective(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """See `Prunable.objective`."""
        return encoder_objective(model, batch, self.head, generator)

    def costs(self, weights: dict[str, Tensor], tools: Tools) -> dict[str, Tensor]:
        """See `Prunable.costs`: the mean square of the input that a number is multiplied by (Sun et al., "A Simple and
        Effective Pruning Approach for Large Language Models", ICLR 2024).

        That of a word's row is how often the word occurs per token, once at least. A head that is tied to the
        embeddings adds as many mean squares of its own input.
        """
        tokens = tools.calibration()
        check_positions(tokens, self.model, self.folder)
        rows = rows_of(tokens, self.folder, "", tools.seed, ROWS_AT_ONCE)  # without [MASK]
        decoder = self.model.get_output_embeddings()
        tied = decoder is not None and decoder.weight is self.model.get_parameter(self.embedding)
        watched: dict[str, Any] = self.linears | ({self.embedding: decoder} if tied else {})
        squares = {name: torch.zeros(module.in_features).double() for name, module in watched.items()}
        model = self.with_weights(weights)
        watch_inputs(model, watched, rows, outputs, lambda name, x: squares[name].add_(x.square().sum(0)))
        seen = torch.cat([batch.tokens[batch.visible.bool()] for batch in rows])
        means = {name: (total / len(seen)).float() for name, total in squares.items()}
        counts = torch.bincount(seen, minlength=len(weights[self.embedding])).clamp(min=1) / len(seen)
        costs = {name: means[name].expand_as(weights[name]) for name in self.linears}
        of_words = counts[:, None] * (1 + means.get(self.embedding, torch.zeros(1)))
        return costs | {self.embedding: of_words.expand_as(weights[self.embedding])}

    def write(self, weights: dict[str, Tensor], out: Path) -> None:
        """See `Prunable.write`. Zeros are stored: stock transformers knows no other form of them."""
        tensors = read_weights(self.folder)
        tensors |= {name: weights[ours].to(tensors[name].dtype) for name, ours in self.stored.items()}
        copy_model(self.folder, out, *WEIGHTS)
        write_weights(out, TensorWeights(tensors), read_metadata(self.folder))
