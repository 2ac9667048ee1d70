"""Movement pruning: weights that training moves away from zero stay, however small they are.

Sanh, Wolf and Rush, "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (NeurIPS 2020): the score of a weight is
S = -Σ_steps (∂L/∂W)·W. The forward pass has zeros where scores are smallest, and gradients go straight through to all
weights, so that a weight that was removed can come back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.calibrate import Batch
from compress.prune.masks import Scope, smallest, sparsity_after
from compress.training import train

WARM_UP, REACHED = 0.1, 0.8
"""Parts of the steps after which weights begin to go, and after which as many are gone as shall be."""

CHOOSE_EVERY = 10
"""Steps in which the same weights are zero; the saves of a training come after a multiple of it."""


class Movement:
    """Weights with their scores, and their training."""

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, Tensor],
        centres: dict[str, Tensor],
        sparsity: float,
        scope: Scope,
    ) -> None:
        """Args:
        model: with these weights; its parameters of these names are changed.
        weights: matrices by name, less their centres; of W_all the last rows only, where others are not used.
        centres: what a removed number becomes, by name: a row, or zeros.
        sparsity: the share that goes in the end.
        scope: see `masks.smallest`.
        """
        self.model, self.centres, self.sparsity, self.scope = model.requires_grad_(False), centres, sparsity, scope
        self.weights = {name: nn.Parameter(tensor.clone()) for name, tensor in weights.items()}
        self.scores = {name: nn.Parameter(torch.zeros_like(tensor)) for name, tensor in weights.items()}
        """S of each weight; parameters, so that they are saved with the weights, but no optimizer changes them."""
        self._start = sum(int((t == 0).sum()) for t in weights.values()) / sum(t.numel() for t in weights.values())
        self._parameters = {name: model.get_parameter(name).requires_grad_() for name in weights}

    def run(
        self,
        rows: Sequence[Batch],
        training_loss: Callable[[Batch], Tensor],
        steps: int,
        lr: float,
        seed: int,
        path: Path,
        say: Callable[[int, float], None],
    ) -> dict[str, Tensor]:
        """Train in `steps` steps on the loss of the model; the weights, with exact zeros. It goes on after the save in
        `path`."""
        removed: dict[str, Tensor] = {}

        def loss_of(step: int, batch: Batch) -> Tensor:
            nonlocal removed
            if not removed or (step - 1) % CHOOSE_EVERY == 0:
                removed = self.removed(self.share(step, steps))
            self.put(removed)
            return training_loss(batch)

        groups = [
            {"params": list(self.weights.values()), "lr": lr},
            {"params": list(self.scores.values()), "lr": 0.0},
        ]
        train(groups, loss_of, rows, steps, seed, path, say, self.take_gradients)
        removed = self.removed(self.sparsity)
        return {name: torch.where(removed[name], 0.0, w.detach()) for name, w in self.weights.items()}

    def share(self, step: int, steps: int) -> float:
        """The share that is removed in a step: none at first, then it rises fast, and slowly to the end."""
        first, last = round(WARM_UP * steps), max(1, round(REACHED * steps))
        if step <= first:
            return 0.0
        return sparsity_after(
            min(step, last) - first, max(1, last - first), min(self._start, self.sparsity), self.sparsity
        )

    def removed(self, share: float) -> dict[str, Tensor]:
        """Where weights are removed, bool by name."""
        if share == 0:
            return {name: torch.zeros_like(scores, dtype=torch.bool) for name, scores in self.scores.items()}
        return smallest({name: scores.detach() for name, scores in self.scores.items()}, share, self.scope)

    def put(self, removed: dict[str, Tensor]) -> None:
        """Set the model's parameters."""
        with torch.no_grad():
            for name, weights in self.weights.items():
                masked = torch.where(removed[name], 0.0, weights) + self.centres[name]
                self._used(name, self._parameters[name]).copy_(masked)

    def take_gradients(self) -> None:
        """The gradients of the model's parameters become those of all weights, and count for the scores."""
        with torch.no_grad():
            for name, weights in self.weights.items():
                whole = self._parameters[name].grad
                assert whole is not None
                weights.grad = self._used(name, whole).clone()
                self.scores[name].sub_(weights.grad * weights)
                self._parameters[name].grad = None

    def _used(self, name: str, whole: Tensor) -> Tensor:
        return whole[len(whole) - len(self.weights[name]) :]
