"""What `prune_weights` asks of a dense export, or of an encoder of Hugging Face."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calibrate import Batch, hidden_error
from compress.dense.hub_onnx import head_of
from compress.encoder_loss import encoder_objective, outputs, rows_of
from compress.low_rank.fading_linears import linears_of, watch_inputs
from compress.source import WEIGHTS, config_of, copy_model, open_hub_model
from compress.step import Tools
from exports.weight_files import read_metadata, read_weights, write_weights
from exports.weight_source import TensorWeights
from sharebert_common.errors import BadInput

ROWS_AT_ONCE = 32
"""Calibration rows that costs are collected on at once."""

NORM = "the first LayerNorm"
"""Beside the names of matrices."""


class PrunableEncoder:
    """A model that stock transformers loads: its word embeddings, and each `nn.Linear` inside its layers."""

    is_sparse = False

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
        return rows_of(tools.calibration(), self.folder, self.head, tools.seed, rows_at_once)

    def objective(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """See `Prunable.objective`."""
        return encoder_objective(model, batch, self.head, generator)

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Prunable.training_loss`. A distance from the labels before would have no gradient at the start."""
        if self.head == "MaskedLM":
            return self.objective(model, batch, torch.Generator()) / len(batch.tokens)
        ours = outputs(model, batch)
        with torch.no_grad():
            before = outputs(self.before, batch)
        features = hidden_error(ours.hidden_states[-1], before.hidden_states[-1], batch)
        return F.cross_entropy(ours.logits, before.logits.argmax(1)) + features

    def check_labels(self) -> None:
        """Raise BadInput where `training_loss` has nothing to predict."""
        config = self.model.config
        one_label = config.num_labels > 1 and config.problem_type in (None, "single_label_classification")
        if self.head == "MaskedLM" or (self.head and one_label):
            return
        raise BadInput(
            "prune_weights.method: movement trains on masked words or on one label for each row, and "
            f"{self.folder} predicts neither; use surgeon"
        )

    @cached_property
    def before(self) -> Any:
        """The model as the folder holds it, without gradients."""
        return open_hub_model(self.folder, self.head).requires_grad_(False)

    def costs(self, weights: dict[str, Tensor], tools: Tools) -> dict[str, Tensor]:
        """See `Prunable.costs`: the mean square of the input that a number is multiplied by (Sun et al., "A Simple and
        Effective Pruning Approach for Large Language Models", ICLR 2024).

        A word's row is multiplied by 1 where the word occurs, and then divided by the standard deviation of the first
        LayerNorm and multiplied by its weights; a word that never occurs counts as seen once. A head that is tied to
        the embeddings adds the mean squares of its own input, as often as the word occurs.
        """
        rows = rows_of(tools.calibration(), self.folder, "", tools.seed, ROWS_AT_ONCE)  # without [MASK]
        seen = torch.cat([batch.tokens[batch.visible.bool()] for batch in rows])
        decoder, words = self.model.get_output_embeddings(), weights[self.embedding]
        tied = decoder is not None and decoder.weight is self.model.get_parameter(self.embedding)
        norm = self.first_norm()
        watched: dict[str, Any] = self.linears | ({self.embedding: decoder} if tied else {}) | {NORM: norm}
        means: dict[str, Tensor] = {}
        precisions: list[Tensor] = []

        def take(name: str, x: Tensor) -> None:
            if name == NORM:
                precisions.append(1 / (x.var(1, correction=0) + norm.eps))
            else:
                means[name] = means.get(name, 0) + x.square().sum(0) / len(seen)

        watch_inputs(self.with_weights(weights), watched, rows, outputs, take)
        by_word = torch.zeros(len(words)).double().index_add(0, seen, torch.cat(precisions))
        by_word = torch.where(by_word > 0, by_word, torch.cat(precisions).mean()) / len(seen)
        of_words = by_word[:, None] * norm.weight.double().square()
        if tied:
            counts = torch.bincount(seen, minlength=len(words)).clamp(min=1) / len(seen)
            of_words = of_words + counts[:, None] * means[self.embedding]
        costs = {name: means[name].float().expand_as(weights[name]) for name in self.linears}
        return costs | {self.embedding: of_words.float()}

    def first_norm(self) -> nn.LayerNorm:
        """The LayerNorm that reads the embeddings. Raises BadInput: there is none, or it has another width."""
        norms = (module for module in self.model.base_model.modules() if isinstance(module, nn.LayerNorm))
        found = next(norms, None)
        if found is None or found.normalized_shape != self.model.get_parameter(self.embedding).shape[1:]:
            raise BadInput(
                f"prune_weights.method: wanda needs a LayerNorm after the embeddings, and {self.folder} has none; "
                "use surgeon"
            )
        return found

    def write(self, weights: dict[str, Tensor], out: Path) -> None:
        """See `Prunable.write`. Zeros are stored: stock transformers knows no other form of them."""
        tensors = read_weights(self.folder)
        tensors |= {name: weights[ours].to(tensors[name].dtype) for name, ours in self.stored.items()}
        copy_model(self.folder, out, *WEIGHTS)
        write_weights(out, TensorWeights(tensors), read_metadata(self.folder))
