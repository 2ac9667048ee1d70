"""All options of a recipe: the same losses on any ranks and ZeRO stages, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import log_of, losses, train_arguments, train_many

MUON = {"optimizer__muon__generated": True, "optimizer__muon__momentum": 0.9}
COMMON = {"data__micro_batch": 4, "validate__every": 5, "checkpoint__every": 7, "checkpoint__keep": 5}
SMALL = {"model__hidden_size": 24, "model__intermediate_size": 24}
"""Leaves columns of the virtual matrix for a second feed-forward pair."""
MASKS = {
    "data__mask_rate": 0.4,
    "data__mask_schedule__last_rate": 0.15,
    "data__mask_schedule__masked": 1.0,
    "data__mask_schedule__last_masked": 0.6,
    "data__mask_schedule__random": 0.0,
    "data__mask_schedule__last_random": 0.2,
    "data__mask_schedule__shape": "cosine",
}
RECIPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "generated": (
        (0, 1, 2),
        MUON
        | MASKS
        | SMALL
        | {"model__init_scale": 0.35, "model__branch_gain": 0.5, "model__learned_branch_gains": True}
        | {"model__ffn_pairs": 2, "data__row_length__first": 8, "schedule__decay": "wsd"},
    ),
    "matrices": (
        (0, 1, 2),
        {"model__sharing": "none", "optimizer__muon__matrices": True, "optimizer__groups__head__clip": 1e-3}
        | {"optimizer__groups__word_embeddings__lr_factor": 2.0, "optimizer__tuned_width": 16}
        | {"optimizer__ema__decay": 0.9, "validate__ema": True},
    ),
    "layers": (
        (0, 2),
        {"model__sharing": "layers", "model__init_scale": 0.35, "model__branch_gain": 0.5, "schedule__decay": "cosine"}
        | {"data__row_length__first": 8, "data__row_length__growth": "jump"},
    ),
    "adamw": (
        (2, 3),
        MASKS
        | SMALL
        | {"model__init_scale": 0.35, "model__ffn_pairs": 2, "model__ffn_order": "sequence", "schedule__decay": "wsd"}
        | {"optimizer__groups__generator__lr_factor": 0.5, "optimizer__tuned_width": 16}
        | {"optimizer__ema__decay": 0.9, "validate__ema": True, "data__row_length__first": 8},
    ),
}
"""ZeRO stages, and keys: each new option in at least one of them."""


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All recipes on 1, 2 and 3 ranks at their stages, and resumed: on 2 ranks from step 14, and on 3 from step 7, when
    rows are still short."""
    top = tmp_path_factory.mktemp("options")
    for ranks in (1, 2, 3):
        plan: list[dict[str, Any]] = []
        for recipe, (stages, keys) in RECIPES.items():
            folder, given = top / recipe, COMMON | keys
            for stage in stages:
                run = folder / f"{ranks}-{stage}"
                plan.append({"overrides": train_arguments(dataset, run, **given, zero__stage=stage)})
            last = stages[-1]
            resumed = {2: (("more", f"1-{last}", 14), ("again", f"2-{last}", 14)), 3: (("short", f"1-{last}", 7),)}
            for name, source, step in resumed.get(ranks, ()):
                overrides = train_arguments(dataset, folder / name, **given, zero__stage=last)
                plan.append({"overrides": overrides, "copy": [str(folder / source), step]})
        train_many(plan, ranks, top)
    return top


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_agree_on_any_ranks_and_stages_and_after_a_resume(runs: Path, recipe: str) -> None:
    """Without the all-reduce of Muon, losses of 2 ranks would differ from those of one by 7e-5."""
    folder = runs / recipe
    first = sorted(folder.iterdir())[0]
    assert len(losses(first)) == 20
    assert len(validation_losses(first)) == 5
    for run in sorted(folder.iterdir()):
        assert losses(run) == pytest.approx(losses(first), rel=2e-6), run.name
        assert validation_losses(run) == pytest.approx(validation_losses(first), rel=2e-6), run.name
    same = folder / f"2-{RECIPES[recipe][0][-1]}"
    assert losses(folder / "again") == losses(same)
    assert validation_losses(folder / "again") == validation_losses(same)


def validation_losses(run: Path) -> list[float]:
    """The loss of each validation."""
    return [line["valid_loss"] for line in log_of(run) if "valid_loss" in line]
