"""Which heads, columns and layers stay so that the predicted time is within a target.

The loss that each shape costs is estimated by the squared gradients of `structure`. The shapes that cost least by this
estimate are tried on calibration rows, with zeros on what goes, and the one with the least loss is taken: the estimate
is good for a few heads or columns, and worse for a whole layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.prune.calibrate import Batch, hidden_states, objective
from compress.prune.latency_table import LatencyTable, Shape
from compress.prune.structure import Fisher, least_important
from sharebert.heads import ShareBertForMaskedLM
from sharebert_common.errors import BadInput

COLUMN_STEPS = 64
"""A shape has a multiple of this part of the columns."""

TRIED = 16
"""Shapes that are tried on calibration rows."""


class Structure(NamedTuple):
    """The numbers of the parts that stay, ascending."""

    heads: list[int]
    columns: list[int]
    layers: list[int]

    @property
    def shape(self) -> Shape:
        """How many they are."""
        return Shape(len(self.heads), len(self.columns), len(self.layers))

    def factors(self, whole: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """1 on what stays and 0 on what goes: [1, heads], [1, columns], [1, layers]."""
        made = []
        for kept, count in zip(self, whole, strict=True):
            factor = torch.zeros(1, count)
            factor[0, kept] = 1.0
            made.append(factor)
        return made[0], made[1], made[2]


class Candidate(NamedTuple):
    """A shape, and what it costs by the estimate."""

    cost: float
    shape: Shape


def check_target(table: LatencyTable, target: float, where: str) -> None:
    """Raise BadInput where no shape is predicted to be within the target. `where` names the key."""
    least = table.least
    if table.of(least) > target:
        raise BadInput(
            f"{where}: {target:g} of the time is out of reach; {_parts(least)} take {table.of(least):.3f} of it "
            "by the table"
        )


def candidates(fisher: Fisher, table: LatencyTable, target: float) -> list[Candidate]:
    """Shapes within the target, the one that costs least first: for each number of heads and layers, the most columns.

    Args:
        fisher: F of heads, columns and layers.
        table: predicts the time of each shape.
        target: the highest share of the whole model's time.
    """
    costs = [_costs(matrix) for matrix in fisher]
    whole, step = table.whole, max(1, table.whole.columns // COLUMN_STEPS)
    columns = torch.arange(whole.columns, table.least.columns - 1, -step)
    found = []
    for layers in range(whole.layers, 0, -1):
        for heads in range(whole.heads, 0, -1):
            within = table.share(heads, columns, layers) <= target + 1e-9
            if within.any():
                shape = Shape(heads, int(columns[within][0]), layers)
                cost = sum(own[all_of_them - stay] for own, all_of_them, stay in zip(costs, whole, shape, strict=True))
                found.append(Candidate(float(cost), shape))
    return sorted(found, key=lambda candidate: candidate.cost)


def search(
    model: ShareBertForMaskedLM, fisher: Fisher, table: LatencyTable, target: float, rows: Sequence[Batch]
) -> tuple[Structure, float]:
    """The structure that costs least on `rows` of the best candidates, and its loss there (see `masked_loss`).

    The target must be in reach (`check_target`).
    """
    order = [least_important(matrix, len(matrix) - 1) for matrix in fisher]
    best: tuple[Structure, float] | None = None
    for _, shape in candidates(fisher, table, target)[:TRIED]:
        structure = Structure(
            *(
                sorted(set(range(there)) - set(gone[: there - stay]))
                for gone, there, stay in zip(order, table.whole, shape, strict=True)
            )
        )
        loss = masked_loss(model, rows, structure, table.whole)
        if best is None or loss < best[1]:
            best = structure, loss
    assert best is not None
    return best


def masked_loss(model: ShareBertForMaskedLM, rows: Sequence[Batch], structure: Structure, whole: Shape) -> float:
    """The masked-language-model loss with zeros on what goes, a mean over rows; of a model without such a head, the
    squared error of the hidden states, as a part of their mean square."""
    heads, columns, layers = structure.factors(whole)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in rows:
            hidden = hidden_states(model, batch, heads, columns, layers)
            if model.mlm_head is None:
                expected = hidden_states(model, batch)
                total += len(batch.tokens) * float(F.mse_loss(hidden, expected) / expected.square().mean())
            else:
                total += float(objective(model, batch, hidden, torch.Generator()))
            count += len(batch.tokens)
    return total / count


def _costs(matrix: Tensor) -> Tensor:
    """½·1_Rᵀ·F·1_R for the sets R that `least_important` removes: none, one part, two parts, …, all but one."""
    order = least_important(matrix, len(matrix) - 1)
    sums = matrix[order][:, order].cumsum(0).cumsum(1).diagonal() / 2
    return torch.cat([sums.new_zeros(1), sums])


def _parts(shape: Shape) -> str:
    return f"{shape.layers} layer, {shape.heads} head and {shape.columns} columns"
