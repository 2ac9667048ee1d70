"""The step `prune_weights`: weights become zero or the mean of their column."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compress.calibrate import Batch
from compress.prune.masks import Scope, smallest, sparsity_after
from compress.prune.movement import Movement
from compress.prune.prunable import Prunable, PrunableCompact
from compress.prune.prunable_encoder import PrunableEncoder
from compress.prune.surgeon import InverseFisher, blocked, saliency, unblocked, without
from compress.quantise.step import PROJECTION
from compress.saved_state import save_state, saved_state
from compress.step import FormName, NeedsNoRows, Source, Tools
from exports.read import read_export
from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

CHUNK = 16
"""Gradients that update the inverse at once."""

PROGRESS = "pruned.pt"
"""The weights after the last recomputation, in the scratch folder."""

MOVEMENT = "movement.pt"
"""The state of the training of `movement`, in the scratch folder."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class PruneWeights(NeedsNoRows):
    """Set weights to zero. Of a compact export: those of E, of W_all and of the layers' own matrices, stored as a bit
    for each and the numbers that are left. Of a dense export or an encoder of Hugging Face: those of the word
    embeddings and of the layers' matrices, and the file stays as large until it is compressed."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """The share of the weights that become zero; 0: only store the zeros that are there (a
    compact export alone)."""
    method: Literal["magnitude", "wanda", "surgeon", "movement"] = "wanda"
    """How a weight is scored. magnitude: by its size; wanda: by its size and what an error of it costs on calibration
    rows; surgeon: Optimal BERT Surgeon, by gradients on calibration rows, and other weights make up for it; movement:
    by where a training on calibration rows moves it; the others are those of that training, which is on masked words,
    or, of an encoder's classifier, on the labels that it gave before."""
    scope: Scope = "global"
    """global: the share is that of all matrices together; matrix: of each; 2:4: two of each four neighbours."""
    centre: bool = False
    """Weights of the word embeddings that are removed become the mean of their column in place of zero: rows of E have
    much in common. Where E is sparse already, they become what the others of their column are. Not with scope 2:4."""
    recomputations: Annotated[int, Field(ge=1)] = 4
    """surgeon: in how many steps the share is reached; scores are computed anew in each."""
    block: Annotated[int, Field(ge=1)] = 32
    """surgeon: neighbours of a row whose gradients are looked at together."""
    gradients: Annotated[int, Field(ge=1)] = 256
    """surgeon: gradients that the scores are computed from; each is the mean of some calibration rows."""
    damping: Annotated[float, Field(gt=0)] = 0.1
    """surgeon: what is added to the mean squared gradient on the diagonal, as a part of it over all weights."""

    steps: Annotated[int, Field(ge=5)] = 1000
    """movement: steps of the training, each with `batch` calibration rows."""
    batch: Annotated[int, Field(ge=1)] = 32
    """movement: calibration rows of a step."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """movement: the highest learning rate, of AdamW; it rises over the first steps, and falls to zero as a cosine."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return self.method != "magnitude" and self.sparsity > 0

    def check(self, source: Source) -> None:
        """See `Step.check`."""
        if source.form == "compact":
            self.check_ahead(source.form, read_export(source.folder).config)
            return
        self.check_ahead(source.form, None)
        encoder = PrunableEncoder(source.folder)
        if self.method == "wanda":
            encoder.first_norm()
        if self.method == "movement":
            encoder.check_labels()

    def check_ahead(self, form: FormName, config: ShareBertConfig | None) -> None:
        """See `Step.check_ahead`."""
        self.result_form(form)
        if self.scope == "2:4" and self.sparsity != 0.5:
            raise BadInput(f"prune_weights.sparsity: scope 2:4 removes half of the weights, not {self.sparsity:g}")
        if self.centre and self.scope == "2:4":
            raise BadInput("prune_weights.centre: not with scope 2:4, which is for zeros")
        if form != "compact":
            if self.sparsity == 0:
                raise BadInput(
                    "prune_weights.sparsity: 0 makes a compact export store the zeros that it has; no other form can"
                )
        elif config is not None:
            if self.sparsity == 0:  # nothing is scored
                return
            if self.method == "movement" and config.mlm_head == "none":
                raise BadInput(
                    "prune_weights.method: movement trains on masked words, and this model has no "
                    "masked-language-model head; use surgeon"
                )
            if self.method == "wanda" and (config.sharing != "veps" or config.altered):
                raise BadInput(
                    "prune_weights.method: wanda takes a model with sharing: veps that has all heads, columns and "
                    "factors, and one feed-forward pair; use surgeon"
                )

    def result_form(self, source: FormName) -> FormName:
        """See `Step.result_form`."""
        if source == "onnx":
            raise BadInput(
                "prune_weights: takes a compact export, a dense one or an encoder of Hugging Face, not an ONNX file"
            )
        return source

    def result_config(self, config: ShareBertConfig) -> ShareBertConfig:
        """See `Step.result_config`."""
        return config

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        model: Prunable = PrunableCompact(source) if source.form == "compact" else PrunableEncoder(source.folder)
        weights = model.weights
        centres = {name: torch.zeros(tensor.shape[1]) for name, tensor in weights.items()}
        if self.centre:
            words = weights[model.embedding]
            fills = words.mode(0).values
            filled = (words == fills).sum(0) > 1  # by this step before
            centres[model.embedding] = torch.where(filled & model.is_sparse, fills, words.mean(0))
        weights = {name: tensor - centres[name] for name, tensor in weights.items()}
        if self.sparsity > 0:
            if self.method == "surgeon":
                weights = self.by_surgeon(model, weights, centres, tools)
            elif self.method == "movement":
                weights = self.by_movement(model, weights, centres, tools)
            else:
                removed = smallest(self.scores(model, weights, centres, tools), self.sparsity, self.scope)
                weights = {name: torch.where(removed[name], 0.0, weights[name]) for name in weights}
        model.write(_restored(weights, centres), out)
        parts: dict[str, list[Tensor]] = {}
        for name, tensor in weights.items():
            parts.setdefault(name if name in (model.embedding, PROJECTION) else "the layers' matrices", []).append(
                tensor
            )
        return {f"removed of {part}": round(_zeros(tensors), 4) for part, tensors in parts.items()}

    def scores(
        self, model: Prunable, weights: dict[str, Tensor], centres: dict[str, Tensor], tools: Tools
    ) -> dict[str, Tensor]:
        """What each weight is worth, by magnitude or Wanda. Weights are given without the centres."""
        squares = {name: tensor**2 for name, tensor in weights.items()}
        if self.method == "magnitude":
            return squares
        costs = model.costs(_restored(weights, centres), tools)
        return {name: squares[name] * costs[name] for name in weights}

    def by_movement(
        self, model: Prunable, weights: dict[str, Tensor], centres: dict[str, Tensor], tools: Tools
    ) -> dict[str, Tensor]:
        """The weights, without the centres, after the training."""
        rows, start = model.batches(tools, self.batch), model.with_weights(_restored(weights, centres))
        movement = Movement(start, weights, centres, self.sparsity, self.scope)

        def say(step: int, loss: float) -> None:
            share = movement.share(step, self.steps)
            tools.say(f"prune_weights: step {step} of {self.steps}, {share:.1%} removed, loss {loss:.4f}")

        loss = partial(model.training_loss, start)
        return movement.run(rows, loss, self.steps, self.lr, tools.seed, tools.scratch / MOVEMENT, say)

    def by_surgeon(
        self, model: Prunable, weights: dict[str, Tensor], centres: dict[str, Tensor], tools: Tools
    ) -> dict[str, Tensor]:
        """The weights, without the centres, after all recomputations.

        What is done is kept in the scratch folder, and not done again.
        """
        rows = model.batches(tools, max(1, len(tools.calibration()) // self.gradients))
        rows = rows[: self.gradients]
        start = _zeros(weights.values())
        kept = saved_state(tools.scratch / PROGRESS) or {"step": 0, "weights": weights}
        done, weights = kept["step"], kept["weights"]
        for step in range(done + 1, self.recomputations + 1):
            share = sparsity_after(step, self.recomputations, min(start, self.sparsity), self.sparsity)
            inverses = self.inverse_fisher(model, weights, centres, rows, tools.seed)
            worth = {
                name: unblocked(saliency(blocked(tensor, self.block), inverses[name]), tensor.shape)
                for name, tensor in weights.items()
            }
            if self.scope == "2:4" and step < self.recomputations:  # all four-groups lose their two at the end
                removed = {name: smallest({name: values}, share, "matrix")[name] for name, values in worth.items()}
                removed = {name: removed[name] & smallest(worth, 0.5, "2:4")[name] for name in worth}
            else:
                removed = smallest(worth, share, self.scope)
            for name, tensor in weights.items():
                gone = blocked(removed[name] | (tensor == 0), self.block)
                moved = without(blocked(tensor, self.block), gone, inverses.pop(name))
                weights[name] = unblocked(moved, tensor.shape).contiguous()
            save_state(tools.scratch / PROGRESS, {"step": step, "weights": weights})
            share = _zeros(weights.values())
            tools.say(f"prune_weights: {share:.1%} removed after recomputation {step} of {self.recomputations}")
        return weights

    def inverse_fisher(
        self,
        model: Prunable,
        weights: dict[str, Tensor],
        centres: dict[str, Tensor],
        rows: Sequence[Batch],
        seed: int,
    ) -> dict[str, InverseFisher]:
        """F⁻¹ of each matrix, in blocks. A weight that is zero has no gradient, so that it takes part in nothing."""
        generator = torch.Generator().manual_seed(seed)
        module = model.with_weights(_restored(weights, centres))
        parameters = {name: module.get_parameter(name).requires_grad_() for name in weights}
        found: dict[str, InverseFisher] = {}
        for first in range(0, len(rows), CHUNK):
            chunk: dict[str, list[Tensor]] = {name: [] for name in weights}
            for batch in rows[first : first + CHUNK]:
                loss = model.objective(module, batch, generator) / len(batch.tokens)
                for name, given in zip(weights, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                    used = given[len(given) - len(weights[name]) :] * (weights[name] != 0)
                    chunk[name].append(blocked(used, self.block))
            for name in weights:
                together = torch.stack(chunk.pop(name))
                if name not in found:
                    squares = float((together**2).sum()) / (len(together) * weights[name].numel())  # of no filling
                    damping = self.damping * squares + 1e-20
                    found[name] = InverseFisher(together.shape[1], self.block, len(rows), damping)
                found[name].add(together)
        return found


def _restored(weights: dict[str, Tensor], centres: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with their centres. Where several are zero, they become exactly the same number of a column."""
    return {name: tensor + centres[name] for name, tensor in weights.items()}


def _zeros(weights: Collection[Tensor]) -> float:
    return sum(int((t == 0).sum()) for t in weights) / sum(t.numel() for t in weights)
