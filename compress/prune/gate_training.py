"""Gates on heads, columns and layers learn what stays while the predicted time falls to a target.

The loss is that of masked language modelling, together with the distance from the whole model's hidden states, plus
λ₁·(t - T) + λ₂·(t - T)² with the predicted time t and the target T; λ₁ and λ₂ rise where t misses T (Xia, Zhong and
Chen, "Structured Pruning Learns Compact and Accurate Models", ACL 2022, with time in place of sparsity). Matrices stay
as they are; biases and norms learn too. In the last steps the structure is fixed, and only biases and norms learn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.prune.calibrate import Batch, hidden_states, objective
from compress.prune.hard_concrete import open_probability, sampled, settled
from compress.prune.latency_table import LatencyTable, Shape
from compress.prune.structure_search import COLUMN_STEPS, Structure
from compress.training import biases_and_norms, train
from sharebert.heads import ShareBertForMaskedLM

START = 2.5
"""α of every gate at the start: it is open with a probability of 98 %."""

RAMP = 0.5
"""Part of the steps in which the target falls from the whole time to what was asked for."""

SETTLE = 0.2
"""Part of the steps, the last ones, in which the structure is fixed."""

LAMBDA_LR = 0.1
"""Learning rate of λ₁ and λ₂."""


class Kept(NamedTuple):
    """What stays, and its factors."""

    structure: Structure
    heads: Tensor
    """Factor of each head, [1, heads]; 0 where it goes."""
    columns: Tensor
    """Of each column, [1, columns]."""
    layers: Tensor
    """Of each layer, [1, layers]: 0 or 1."""


class GateTraining:
    """The gates of a model, and their training."""

    def __init__(
        self,
        model: ShareBertForMaskedLM,
        whole_model: ShareBertForMaskedLM,
        table: LatencyTable,
        target: float,
        task_weight: float,
        seed: int,
    ) -> None:
        """`model` is changed: its biases and norms learn. `whole_model` is the same model, which stays."""
        self.model, self.whole_model = model.requires_grad_(False), whole_model.requires_grad_(False)
        self.table, self.target, self.task_weight, self.seed = table, target, task_weight, seed
        self.alphas = [nn.Parameter(torch.full((count,), START)) for count in table.whole]
        """α of the gates of heads, columns and layers."""
        self.multipliers = nn.Parameter(torch.zeros(2))
        """λ₁ and λ₂."""

    def run(
        self,
        rows: list[Batch],
        steps: int,
        lr: float,
        gate_lr: float,
        path: Path,
        say: Callable[[int, float, float], None],
    ) -> Kept:
        """Train in `steps` steps; what stays. It goes on after the save in `path`; `say` is given the step, the loss
        and the predicted share of the time."""
        own = [parameter.requires_grad_() for parameter in biases_and_norms(self.model).values()]
        groups = [
            {"params": own, "lr": lr},
            {"params": self.alphas, "lr": gate_lr, "constant": True},
            {"params": [self.multipliers], "lr": LAMBDA_LR, "constant": True, "maximize": True},
        ]
        last = round((1 - SETTLE) * steps)
        kept: Kept | None = None

        def loss_of(step: int, batch: Batch) -> Tensor:
            nonlocal kept
            if step <= last:
                ramped = 1 + (self.target - 1) * min(1.0, step / (RAMP * steps))
                return self.loss(batch, *self.gates(len(batch.tokens), step)) + self.penalty(ramped)
            kept = kept or self.kept()
            return self.loss(batch, kept.heads, kept.columns, kept.layers)

        train(groups, loss_of, rows, steps, self.seed, path, lambda step, loss: say(step, loss, float(self.share())))
        return self.kept()

    def gates(self, rows: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random gates of heads, columns and layers for each of `rows` rows; `step` and the seed decide them."""
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        found = []
        for alpha in self.alphas:
            uniform = torch.rand(rows, len(alpha), generator=generator).clamp(1e-6, 1 - 1e-6)
            found.append(sampled(alpha, uniform))
        return found[0], found[1], found[2]

    def loss(self, batch: Batch, heads: Tensor, columns: Tensor, layers: Tensor) -> Tensor:
        """The weighted sum of both losses with factors on parts, a mean over rows."""
        hidden = hidden_states(self.model, batch, heads, columns, layers)
        total = torch.zeros(())
        if self.task_weight < 1:
            with torch.no_grad():
                expected = hidden_states(self.whole_model, batch)
            total = (1 - self.task_weight) * F.mse_loss(hidden, expected) / expected.square().mean()
        if self.task_weight > 0:
            task = objective(self.model, batch, hidden, torch.Generator()) / len(batch.tokens)
            total = total + self.task_weight * task
        return total

    def share(self) -> Tensor:
        """The predicted share of the time with the expected numbers of heads, columns and layers."""
        return self.table.share(*(open_probability(alpha).sum() for alpha in self.alphas))

    def penalty(self, target: float) -> Tensor:
        """λ₁·(t - T) + λ₂·(t - T)²."""
        over = self.share() - target
        return (self.multipliers.double() * torch.stack([over, over**2])).sum()

    def kept(self) -> Kept:
        """The most likely heads and layers, and as many of the most likely columns as the target allows.

        Where not even the fewest columns fit, the least likely heads and layers go too. The target must be in reach.
        """
        heads, columns, layers = (open_probability(alpha.detach()) for alpha in self.alphas)
        stay = {"heads": _likely(heads), "layers": _likely(layers)}
        counts = range(len(columns), self.table.least.columns - 1, -max(1, len(columns) // COLUMN_STEPS))
        while True:
            shapes = (Shape(len(stay["heads"]), count, len(stay["layers"])) for count in counts)
            shape = next((shape for shape in shapes if self.table.of(shape) <= self.target + 1e-9), None)
            if shape is not None:
                break
            ends = [
                (float(p[stay[key][-1]]), key) for key, p in (("heads", heads), ("layers", layers)) if stay[key][1:]
            ]
            stay[min(ends)[1]].pop()
        likely = columns.argsort(descending=True, stable=True)[: shape.columns].tolist()
        structure = Structure(sorted(stay["heads"]), sorted(likely), sorted(stay["layers"]))
        masks = structure.factors(self.table.whole)
        values = [torch.where(open_probability(a) > 0.5, settled(a), 1.0).detach() for a in self.alphas]
        return Kept(structure, masks[0] * values[0], masks[1] * values[1], masks[2])


def _likely(probabilities: Tensor) -> list[int]:
    """The parts that stay rather than go, and at least one; the most likely one first."""
    order = probabilities.argsort(descending=True, stable=True).tolist()
    return order[: max(1, int((probabilities > 0.5).sum()))]
