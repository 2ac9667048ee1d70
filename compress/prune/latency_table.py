"""A table of measured times, and what it predicts for every number of heads, columns and layers (ZipLM's idea:
Kurtic et al., NeurIPS 2023, "ZipLM: Inference-Aware Structured Pruning of Language Models").

The time of a model is that of its rest, and layers · (that of a layer). A layer with fewer heads is faster by what was
measured with all columns, one with fewer columns by what was measured with all heads; between two measured numbers it
is a straight line. So a few measurements are enough, and the prediction has a gradient.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from compress.saved_state import naming_damage
from compress.shape_times import Call, shape_times
from pretrain.run.environment import cpu_name
from sharebert.config import ShareBertConfig
from sharebert_common.files import write_atomically

SHARES = (0.75, 0.5, 0.25, 0.125)
"""Shares of the heads and of the columns that are measured, beside all of them."""


COLUMN_STEPS = 64
"""A search takes multiples of this part of the columns: products are faster with round numbers."""


class Shape(NamedTuple):
    """How many parts a model has."""

    heads: int
    columns: int
    layers: int


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of a whole model, by one number that differs from the whole model."""

    whole: Shape
    call: Call
    """What was timed."""
    ms: float
    """Of the whole model."""
    heads: dict[int, float]
    """Number of heads → milliseconds, the whole model's too; ascending."""
    columns: dict[int, float]
    """Number of columns → milliseconds, likewise."""
    layers: dict[int, float]
    """Number of layers → milliseconds, likewise: one or two entries."""

    @property
    def least(self) -> Shape:
        """The smallest shape that a search may give: an eighth of the columns."""
        return Shape(1, min(self.columns), 1)

    @property
    def column_counts(self) -> list[int]:
        """Numbers of columns that a search may give, the most first."""
        step = max(1, self.whole.columns // COLUMN_STEPS)
        return [*range(self.whole.columns, min(self.columns), -step), min(self.columns)]

    def share(self, heads: Tensor | float, columns: Tensor | float, layers: Tensor | float) -> Tensor:
        """The predicted time as a share of the whole model's, float64, for numbers that need not be whole.

        The numbers are of any shapes that fit together. Gradients flow to those that are tensors.
        """
        fewest = min(self.layers)
        layer = self.ms / self.whole.layers
        if fewest < self.whole.layers:
            layer = (self.ms - self.layers[fewest]) / (self.whole.layers - fewest)
        saved = (2 * self.ms - _between(self.heads, heads) - _between(self.columns, columns)) / self.whole.layers
        rest = self.ms - self.whole.layers * layer
        return (rest + torch.as_tensor(layers, dtype=torch.float64) * (layer - saved)) / self.ms

    def of(self, shape: Shape) -> float:
        """`share` of a shape, as a number."""
        return float(self.share(*shape))


def measure_table(config: ShareBertConfig, call: Call) -> LatencyTable:
    """Time the shapes of a table; the model must generate its matrices."""
    whole = shape_of(config)
    heads = sorted({1, whole.heads, *(max(1, round(part * whole.heads)) for part in SHARES)})
    columns = sorted({whole.columns, *(max(1, round(part * whole.columns)) for part in SHARES)})
    layers = sorted({max(1, whole.layers // 2), whole.layers})
    shapes = {whole}
    shapes |= {whole._replace(heads=number) for number in heads}
    shapes |= {whole._replace(columns=number) for number in columns}
    shapes |= {whole._replace(layers=number) for number in layers}
    asked = sorted(shapes, reverse=True)
    found = dict(zip(asked, shape_times([config_of(config, shape) for shape in asked], call), strict=True))
    return LatencyTable(
        whole,
        call,
        found[whole],
        _rising({number: found[whole._replace(heads=number)] for number in heads}),
        _rising({number: found[whole._replace(columns=number)] for number in columns}),
        _rising({number: found[whole._replace(layers=number)] for number in layers}),
    )


def kept_table(path: Path, config: ShareBertConfig, call: Call) -> LatencyTable | None:
    """The table in the JSON file `path`. None: there is none, or it is of another processor, model or call.

    Raises BadInput, naming the file, where it is damaged.
    """
    if not path.is_file():
        return None
    with naming_damage(path):
        kept = dict(json.loads(path.read_text(encoding="utf-8")))
        if kept.pop("cpu", None) != cpu_name():
            return None
        kept |= {key: {int(n): ms for n, ms in kept[key].items()} for key in ("heads", "columns", "layers")}
        table = LatencyTable(**{**kept, "whole": Shape(**kept["whole"]), "call": Call(**kept["call"])})
    return table if (table.whole, table.call) == (shape_of(config), call) else None


def keep_table(path: Path, table: LatencyTable) -> None:
    """Write the table, and the name of this machine's processor, to the JSON file `path`."""
    plain = {**dataclasses.asdict(table), "whole": table.whole._asdict(), "call": table.call._asdict()}
    write_atomically(path, json.dumps({"cpu": cpu_name(), **plain}, indent=1) + "\n")


def shape_of(config: ShareBertConfig) -> Shape:
    """How many parts a model of `config` has."""
    return Shape(config.heads, config.inner_size, config.num_hidden_layers)


def config_of(config: ShareBertConfig, shape: Shape) -> ShareBertConfig:
    """A config with the first heads, columns and layers of a model: its shape, not its weights."""
    heads = config.kept_heads or tuple(range(config.num_attention_heads))
    columns = config.kept_columns or tuple(range(config.intermediate_size))
    return dataclasses.replace(
        config,
        kept_heads=heads[: shape.heads] if shape.heads < config.heads else config.kept_heads,
        kept_columns=columns[: shape.columns] if shape.columns < config.inner_size else config.kept_columns,
        num_hidden_layers=shape.layers,
    )


def _rising(times: dict[int, float]) -> dict[int, float]:
    """The times, none above one of a higher number: where it was, other work on the machine disturbed it."""
    return {number: min(ms for other, ms in times.items() if other >= number) for number in times}


def _between(points: dict[int, float], number: Tensor | float) -> Tensor:
    """The straight line between the two measured neighbours of a number; below the first, that of the first two."""
    x = torch.tensor(list(points), dtype=torch.float64)
    y = torch.tensor(list(points.values()), dtype=torch.float64)
    asked = torch.as_tensor(number, dtype=torch.float64)
    if len(x) == 1:
        return y[0].expand(asked.shape)
    right = torch.searchsorted(x, asked.detach().contiguous()).clamp(1, len(x) - 1)
    slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
    return y[right - 1] + slope * (asked - x[right - 1])
