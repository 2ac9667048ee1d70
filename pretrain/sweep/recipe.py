"""What a sweep varies, and the trials that this makes."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as recipe_dataclass

from pretrain.recipe import TrainRecipe
from sharebert_common.errors import BadInput, nearest
from sharebert_common.recipe import STRICT, load

Keys = dict[str, Any]
"""Dotted keys of a train recipe, with values: {"optimizer.lr": 0.003}."""


@recipe_dataclass(config=STRICT, kw_only=True)
class SweepRecipe:
    """Trainings that differ in some keys. There is one for each arm, each point of the grid and each seed."""

    folder: str
    """Where the runs, their recipes and the table are."""
    base: str
    """The train recipe that all trials start from: a path, or the name of one that ships with the project."""
    common: Keys = field(default_factory=dict)
    """Keys of the train recipe that all trials have."""
    arms: dict[str, Keys] = field(default_factory=lambda: {"base": {}})
    """Name of each arm, and the keys in which it differs. They win over `grid` and `common`. The key `base` of an arm
    is another recipe to start from."""
    only: list[str] | None = None
    """Names of the arms that run; without it, all of them."""
    grid: Annotated[dict[str, list[Any]], Field()] = field(default_factory=dict)
    """Values of keys; every arm runs with every combination of them."""
    seeds: Annotated[list[int], Field(min_length=1)] = field(default_factory=lambda: [0])
    """Seeds of the runs. All trials run with the first seed before any runs with the second."""
    reference: str | None = None
    """The row of the table whose final loss the others are to reach; without it, the first row."""


@dataclass(frozen=True)
class Trial:
    """One training of a sweep."""

    row: str
    """The row of the table that it belongs to: its arm and its point of the grid."""
    seed: int
    keys: Keys
    """In which it differs from the base."""
    recipe: TrainRecipe

    @property
    def run(self) -> Path:
        """The directory of its run."""
        return Path(self.recipe.run)


def trials(sweep: SweepRecipe) -> list[Trial]:
    """All trials, in the order in which they run.

    Raises BadInput: an unknown key or a wrong value in an arm, an arm in `only` that is none, or a reference that is no
    row.
    """
    for name in sweep.only or ():
        if name not in sweep.arms:
            raise BadInput(f"only: no arm '{name}'{nearest(name, sweep.arms)}")
    arms = {name: keys for name, keys in sweep.arms.items() if sweep.only is None or name in sweep.only}
    points = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    made: list[Trial] = []
    for seed, (arm, keys), point in itertools.product(sweep.seeds, arms.items(), points):
        row = _name(arm, {key: value for key, value in point.items() if key not in keys})
        differs = point | {key: value for key, value in keys.items() if key != "base"}
        run = {"run": str(Path(sweep.folder) / "runs" / f"{row},seed={seed}"), "seed": seed}
        overrides = [f"{key}={json.dumps(value)}" for key, value in (sweep.common | differs | run).items()]
        try:
            recipe = load(TrainRecipe, keys.get("base", sweep.base), overrides)
        except BadInput as error:
            raise BadInput(f"arm {row}: {error}") from error
        trial = Trial(row, seed, differs, recipe)
        if all(trial.run != other.run for other in made):  # an arm may fix what the grid varies
            made.append(trial)
    rows = {trial.row for trial in made}
    if sweep.reference is not None and sweep.reference not in rows:
        raise BadInput(f"reference: no row '{sweep.reference}'{nearest(sweep.reference, rows)}")
    return made


def _name(arm: str, point: Keys) -> str:
    """A row's name, that is also a folder's."""
    parts = [arm, *(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())]
    return re.sub(r"[^\w.,=+-]", "_", ",".join(parts))
