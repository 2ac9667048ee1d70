"""Gates on heads, columns and layers learn what stays while the predicted time falls to a target.

The loss is that of masked language modelling, together with the distance from the whole model's hidden states, plus
λ₁·(t - T) + λ₂·(t - T)² with the predicted time t and the target T; λ₁ and λ₂ rise where t misses T (Xia, Zhong and
Chen, "Structured Pruning Learns Compact and Accurate Models", ACL 2022, with time in place of sparsity). Matrices stay
as they are; biases and norms learn too. In the last steps the structure is fixed, and only biases and norms learn: the
structure is the one with the least loss of the most likely ones within the target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress.calibrate import Batch, hidden_error, hidden_states, objective
from compress.prune.hard_concrete import open_probability, sampled, settled
from compress.prune.latency_table import LatencyTable
from compress.prune.structure_search import Structure, by_probability, search
from compress.saved_state import naming_damage
from compress.training import biases_and_norms, train
from sharebert.heads import ShareBertForMaskedLM
from sharebert_common.files import make_folders, write_atomically

START = 2.5
"""α of every gate at the start: it is open with a probability of 98 %."""

RAMP = 0.3
"""Part of the steps in which the target falls from the whole time to what was asked for."""

SETTLE = 0.4
"""Part of the steps, the last ones, in which the structure is fixed."""

LAMBDA_2 = 20.0
"""λ₂ at the start; λ₁ starts at 0."""

LAMBDA_LR = 0.02
"""Learning rate of λ₁ and λ₂."""

LIMIT = 4.0
"""α stays between -LIMIT and LIMIT, so that a gate that is open or closed for long can still turn."""

STATE, CHOSEN = "training.pt", "structure.json"
"""The state of the training, and the structure once it is fixed, in the folder of what is saved."""


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
        self.multipliers = nn.Parameter(torch.tensor([0.0, LAMBDA_2]))
        """λ₁ and λ₂."""

    def run(
        self,
        rows: Sequence[Batch],
        steps: int,
        lr: float,
        gate_lr: float,
        folder: Path,
        say: Callable[[int, float, float], None],
    ) -> Kept:
        """Train in `steps` steps; what stays. It goes on after what is saved in `folder`; `say` is given the step, the
        loss and the predicted share of the time."""
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
            with torch.no_grad():
                for alpha in self.alphas:
                    alpha.clamp_(-LIMIT, LIMIT)
            if step <= last:
                ramped = 1 + (self.target - 1) * min(1.0, step / (RAMP * steps))
                return self.loss(batch, *self.gates(len(batch.tokens), step)) + self.penalty(ramped)
            if kept is None:
                kept = self.with_factors(self.chosen(rows, folder / CHOSEN, anew=step == last + 1))
            return self.loss(batch, kept.heads, kept.columns, kept.layers)

        def saved(step: int, loss: float) -> None:
            say(step, loss, float(self.share().detach()))

        train(groups, loss_of, rows, steps, self.seed, folder / STATE, saved)
        return self.with_factors(self.chosen(rows, folder / CHOSEN))

    def chosen(self, rows: Sequence[Batch], path: Path, anew: bool = False) -> Structure:
        """The structure in the JSON file `path`; `anew`, or where there is none, searches it and writes it there.

        Of the most likely structures within the target, the one with the least loss. Raises BadInput, naming the file,
        where it is damaged.
        """
        if anew or not path.is_file():
            rankings = by_probability([open_probability(alpha.detach()) for alpha in self.alphas])
            structure, _ = search(self.model, rankings, self.table, self.target, rows)
            make_folders(path.parent)
            write_atomically(path, json.dumps(structure._asdict()) + "\n")
        with naming_damage(path):
            return Structure(**json.loads(path.read_text(encoding="utf-8")))

    def with_factors(self, structure: Structure) -> Kept:
        """The structure with the values of gates as factors; of a gate that is rather closed, 1."""
        heads, columns, layers = structure.factors(self.table.whole)
        values = [torch.where(open_probability(a) > 0.5, settled(a), 1.0).detach() for a in self.alphas[:2]]
        return Kept(structure, heads * values[0], columns * values[1], layers)

    def gates(self, rows: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random gates of heads, columns and layers for each of `rows` rows; `step` and the seed decide them."""
        generator = torch.Generator().manual_seed(((self.seed << 32) + step) % 2**63)
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
            total = (1 - self.task_weight) * hidden_error(hidden, expected, batch)
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
