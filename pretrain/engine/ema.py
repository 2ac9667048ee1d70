"""The exponential moving average (EMA) of the weights.

Each rank has the average of those fp32 weights that it updates: 4 bytes an element, divided over the ranks as the
moments are. It begins as the plain mean of the weights after each step, and becomes the exponential average when that
mean has as many steps as the decay weighs, 1/(1 - decay): so the weights at the start have no share in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from pretrain.engine.fragments import EMA
from sharebert_common.recipe import STRICT

SWAPPED_ELEMENTS = 2**24
"""Elements that `swap` copies at once."""


@dataclass(config=STRICT, kw_only=True)
class EmaRecipe:
    """An exponential moving average of the weights, beside those that are trained."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Weight of the average before a step in that after it (Polyak and Juditsky, 1992; Morales-Brotons et al.,
    "Exponential Moving Average of Weights in Deep Learning", TMLR 2024). 0 keeps no average."""
    start: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps before the first whose weights count."""


class WeightAverage:
    """The average of the weights that this rank updates."""

    def __init__(self, recipe: EmaRecipe, states: Callable[[], Iterable[tuple[Tensor, dict[str, Any]]]]) -> None:
        """`states` gives each tensor that the optimizer steps, and its state in the optimizer, where the average is."""
        self._recipe, self._states = recipe, states
        self.steps = 0
        """How many steps are in the average."""
        for weights, state in states():
            state[EMA] = torch.zeros_like(weights)

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""
        if step <= self._recipe.start:
            return
        decay = min(self._recipe.decay, self.steps / (self.steps + 1))
        for weights, state in self._states():
            state[EMA].lerp_(weights, 1 - decay)
        self.steps += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average, bit for bit."""
        for weights, state in self._states():
            pairs = zip(
                weights.detach().view(-1).split(SWAPPED_ELEMENTS),
                state[EMA].view(-1).split(SWAPPED_ELEMENTS),
                strict=True,
            )
            for a, b in pairs:
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)
