"""Which heads, columns and layers stay so that the predicted time is within a target.

Parts are ranked: by the squared gradients of `structure`, or by trained gates. A ranking says in which order parts go,
and what it costs. The shapes within the target that cost least by the rankings are tried on calibration rows, with
zeros on what goes, and the one with the least loss is taken: rankings are good for a few heads or columns, and worse
for a whole layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compress.calibrate import Batch, hidden_error, hidden_states, objective
from compress.prune.latency_table import LatencyTable, Shape
from compress.prune.structure import Fisher, least_important
from sharebert.heads import ShareBertForMaskedLM
from sharebert_common.errors import BadInput

TRIED = 16
"""Shapes that are tried on calibration rows."""

TRIED_ROWS = 512
"""Calibration rows on which they are tried."""


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


class Ranking(NamedTuple):
    """Which parts of a kind go first."""

    order: list[int]
    """All parts but the last one that would go, the first one to go first."""
    costs: Tensor
    """What it costs to remove none, one part, two parts, and so on: one number more than in `order`."""


def by_gradients(fisher: Fisher) -> list[Ranking]:
    """Rankings of heads, columns and layers; the cost of a set R is ½·1_Rᵀ·F·1_R."""
    found = []
    for matrix in fisher:
        order = least_important(matrix, len(matrix) - 1)
        sums = matrix[order][:, order].cumsum(0).cumsum(1).diagonal() / 2
        found.append(Ranking(order, torch.cat([sums.new_zeros(1), sums])))
    return found


def by_probability(probabilities: Sequence[Tensor]) -> list[Ranking]:
    """Rankings by the probability p that each part stays; the cost is how much less likely the structure is than that
    with all parts, Σ_R log(p / (1 - p)), so that the most likely structure costs least."""
    found = []
    for p in probabilities:
        order = p.argsort(stable=True)[:-1]
        sums = torch.logit(p.double()[order], eps=1e-12).cumsum(0)
        found.append(Ranking(order.tolist(), torch.cat([sums.new_zeros(1), sums])))
    return found


def candidates(rankings: Sequence[Ranking], table: LatencyTable, target: float) -> list[Candidate]:
    """Shapes within the target, the one that costs least first: for each number of heads and layers, the most columns.

    Args:
        rankings: of heads, columns and layers.
        table: predicts the time of each shape.
        target: the highest share of the whole model's time.
    """
    whole, columns = table.whole, torch.tensor(table.column_counts)
    found = []
    for layers in range(whole.layers, 0, -1):
        for heads in range(whole.heads, 0, -1):
            within = table.share(heads, columns, layers) <= target + 1e-9
            if within.any():
                shape = Shape(heads, int(columns[within][0]), layers)
                parts = zip(rankings, whole, shape, strict=True)
                cost = sum(float(ranking.costs[there - stay]) for ranking, there, stay in parts)
                found.append(Candidate(cost, shape))
    return sorted(found, key=lambda candidate: candidate.cost)


def search(
    model: ShareBertForMaskedLM,
    rankings: Sequence[Ranking],
    table: LatencyTable,
    target: float,
    rows: Sequence[Batch],
) -> tuple[Structure, float]:
    """The structure that costs least on the first TRIED_ROWS rows of the best candidates, and its loss there (see
    `masked_loss`).

    The target must be in reach (`check_target`).
    """
    best: tuple[Structure, float] | None = None
    tried = rows[: max(1, TRIED_ROWS // len(rows[0].tokens))]
    for _, shape in candidates(rankings, table, target)[:TRIED]:
        parts = zip(rankings, table.whole, shape, strict=True)
        kept = (sorted(set(range(there)) - set(ranking.order[: there - stay])) for ranking, there, stay in parts)
        structure = Structure(*kept)
        loss = masked_loss(model, tried, structure, table.whole)
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
                total += len(batch.tokens) * float(hidden_error(hidden, expected, batch))
            else:
                total += float(objective(model, batch, hidden, torch.Generator()))
            count += len(batch.tokens)
    return total / count


def _parts(shape: Shape) -> str:
    return f"{shape.layers} layer, {shape.heads} head and {shape.columns} columns"
