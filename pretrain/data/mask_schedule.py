"""How many tokens are masked, and by what they are replaced, over the course of a run."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from pretrain.data.masks import DEFAULT_SHARES
from sharebert_common.recipe import STRICT

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(config=STRICT, kw_only=True)
class MaskScheduleRecipe:
    """Masks over the course of a run. A key `last_…` that is not given does not change its value over the steps."""

    shape: Literal["linear", "cosine"] = "linear"
    """How values go from the first step's to the last step's."""
    last_rate: Annotated[float, Field(gt=0, le=0.5)] | None = None
    """Mask rate at the end; `data.mask_rate` is that at the start. A rate that falls from 0.3 to 0.15 trained BERT-base
    1.89 times as fast in Yang et al., "Learning Better Masking for Better Language Model Pre-training", ACL 2023."""
    masked: Share = DEFAULT_SHARES[0]
    """Share of the chosen tokens that become [MASK] at the start. With 1.0 there are no others, as Wettig et al. tried
    in "Should You Mask 15% in Masked Language Modeling?" (EACL 2023), and held-out rows are masked alike."""
    random: Share = DEFAULT_SHARES[1]
    """Share of the chosen tokens that become a random word at the start. The rest stays as it is."""
    last_masked: Share | None = None
    """`masked` at the end."""
    last_random: Share | None = None
    """`random` at the end."""

    @model_validator(mode="after")
    def _shares_fit(self) -> MaskScheduleRecipe:
        for when, (masked, random) in (("at the start", self.shares(0.0)), ("at the end", self.shares(1.0))):
            if masked + random > 1 + 1e-9:
                raise ValueError(f"masked {masked:g} and random {random:g} {when} are more than 1 together; lower one")
        return self

    def rate(self, first: float, done: float) -> float:
        """The mask rate after the fraction `done` of the run, where it starts with `first`."""
        return first if self.last_rate is None else self._between(first, self.last_rate, done)

    def shares(self, done: float) -> tuple[float, float]:
        """The shares of [MASK] and of random words after the fraction `done` of the run."""
        ends = ((self.masked, self.last_masked), (self.random, self.last_random))
        masked, random = (first if last is None else self._between(first, last, done) for first, last in ends)
        return masked, random

    def _between(self, first: float, last: float, done: float) -> float:
        done = min(1.0, max(0.0, done))
        way = done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2
        return (1 - way) * first + way * last


def masks_of_steps(
    recipe: MaskScheduleRecipe, first_rate: float, starts: NDArray[np.int64], run_rows: int
) -> dict[str, NDArray[Any]]:
    """The `rates` [n] and `shares` [n, 2] of `Masks.apply` for steps that begin at row positions `starts` [n].

    The fraction done is that of the rows of the run, so it depends on the position alone: not on ranks, attempts or
    skipped rows.
    """
    done = [int(start) / run_rows for start in starts]
    return {
        "rates": np.array([recipe.rate(first_rate, d) for d in done]),
        "shares": np.array([recipe.shares(d) for d in done]),
    }
