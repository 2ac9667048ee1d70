"""What a sweep varies, and the trials that this makes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as recipe_dataclass

from pretrain.recipe import TrainRecipe
from pretrain.run.event_file import flatten
from sharebert_common.errors import BadInput, nearest
from sharebert_common.recipe import STRICT, load, plain

Keys = dict[str, Any]
"""Dotted keys of a train recipe, with values: {"optimizer.lr": 0.003}."""

NOT_VARIED = {"run": "it follows from `folder`", "seed": "`seeds` is for that"}
"""Keys of a train recipe that the sweep itself sets for each trial, and where they come from."""


@recipe_dataclass(config=STRICT, kw_only=True)
class SweepRecipe:
    """Trainings that differ in some keys. There is one for each arm, each point of the grid and each seed."""

    folder: str
    """Where the runs, their recipes and the table are."""
    base: str
    """The train recipe that all trials start from: a path, or the name of one that ships with the project."""
    common: Keys = field(default_factory=dict)
    """Keys of the train recipe that all trials have; not `run` and `seed`, which each trial has of its own."""
    arms: Annotated[dict[str, Keys], Field(min_length=1)] = field(default_factory=lambda: {"base": {}})
    """Name of each arm, and the keys in which it differs. They win over `grid` and `common`. The key `base` of an arm
    is another recipe to start from."""
    only: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the arms that run; without it, all of them."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = field(default_factory=dict)
    """Values of keys; every arm runs with every combination of them."""
    seeds: Annotated[list[int], Field(min_length=1)] = field(default_factory=lambda: [0])
    """Seeds of the runs. All trials run with the first seed before any runs with the second."""
    reference: str | None = None
    """The row of the table whose final loss the others are to reach; without it, or where `only` leaves its arm out,
    the first row."""


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

    Raises BadInput: an unknown key or a wrong value in an arm, a key that is no trial's to vary, two trials with the
    same folder, an arm in `only` that is none, or a reference that is no row.
    """
    given = {"common": sweep.common, "grid": sweep.grid, **{f"arms.{name}": keys for name, keys in sweep.arms.items()}}
    refuse_set_keys(given, {key: f"is set by the sweep for each trial ({why})" for key, why in NOT_VARIED.items()})
    for name in sweep.only or ():
        if name not in sweep.arms:
            raise BadInput(f"only: no arm '{name}'{nearest(name, sweep.arms)}")
    arms = {name: keys for name, keys in sweep.arms.items() if sweep.only is None or name in sweep.only}
    points = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    made: dict[Path, Trial] = {}
    for seed, (arm, keys) in itertools.product(sweep.seeds, arms.items()):
        of_arm: list[Trial] = []
        for point in points:
            trial = _trial(sweep, arm, keys, point, seed)
            if (other := made.get(trial.run)) is None:
                _refuse_twin(arm, trial, of_arm)
                made[trial.run] = trial
                of_arm.append(trial)
            elif changed := differing_keys(other.recipe, trial.recipe):  # none where an arm fixes what the grid varies
                raise BadInput(
                    f"arm {arm}: two trials, with different {', '.join(changed)}, would have the folder {trial.run}; "
                    "rename an arm, or make arms of the values of the grid"
                )
    rows = {_row(arm, keys, point) for arm, keys in sweep.arms.items() for point in points}  # `only` may leave it out
    if sweep.reference is not None and sweep.reference not in rows:
        raise BadInput(f"reference: no row '{sweep.reference}'{nearest(sweep.reference, rows)}")
    return list(made.values())


def reference_row(sweep: SweepRecipe, made: Sequence[Trial]) -> str:
    """The row that the others are compared with: the recipe's; the first of `made` where it has none of that."""
    rows = [trial.row for trial in made]
    return sweep.reference if sweep.reference in rows else rows[0]


def differing_keys(one: TrainRecipe, other: TrainRecipe) -> list[str]:
    """The dotted keys whose values differ, in order."""
    a, b = (flatten(plain(recipe)) for recipe in (one, other))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _trial(sweep: SweepRecipe, arm: str, keys: Keys, point: Keys, seed: int) -> Trial:
    """The trial of an arm at a point of the grid. Raises BadInput, naming its row."""
    row = _row(arm, keys, point)
    differs = point | {key: value for key, value in keys.items() if key != "base"}
    run = {"run": str(Path(sweep.folder) / "runs" / f"{row},seed={seed}"), "seed": seed}
    overrides = [f"{key}={json.dumps(value)}" for key, value in (sweep.common | differs | run).items()]
    try:
        return Trial(row, seed, differs, load(TrainRecipe, keys.get("base", sweep.base), overrides))
    except BadInput as error:
        raise BadInput(f"arm {row}: {error}") from error


def _refuse_twin(arm: str, trial: Trial, others: list[Trial]) -> None:
    """Raise BadInput where another point of the grid is the same training: a value has no effect."""
    for other in others:
        if replace(trial.recipe, run=other.recipe.run) == other.recipe:
            raise BadInput(
                f"arm {arm}: '{other.row}' and '{trial.row}' are the same training; either two values of the grid are "
                "equal, or the arm sets a key of the grid in another form: write it as the grid does"
            )


def refuse_set_keys(given: Mapping[str, Container[str]], said: Mapping[str, str]) -> None:
    """Raise BadInput where a recipe gives a key that is set for each training: it would have no effect.

    Args:
        given: the keys that are given, by the place in the recipe.
        said: what to say of each key that may not be among them.
    """
    for place, keys in given.items():
        for key, why in said.items():
            if key in keys:
                raise BadInput(f"{place}: {key} {why}; remove it")


def _row(arm: str, keys: Keys, point: Keys) -> str:
    """The name of the row of an arm, with `keys`, at a point of the grid. It is part of a folder's name too."""
    varied = {key: value for key, value in point.items() if key not in keys}
    parts = [arm, *(f"{key.rpartition('.')[2]}={value}" for key, value in varied.items())]
    return re.sub(r"[^\w.,=+-]", "_", ",".join(parts))
