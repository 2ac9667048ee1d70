"""All options of a recipe: the same losses on any ranks and ZeRO stages, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MASKS, log_of, losses, train_arguments, train_many, whole

from pretrain.checkpoint.format import read_whole
from pretrain.engine.fragments import EMA, STATES
from sharebert_common.run_files import read_state

MUON = {"optimizer__muon__generated": True, "optimizer__muon__momentum": 0.9}
COMMON = {"validate__every": 5, "checkpoint__every": 7, "checkpoint__keep": 5}
MICRO_BATCH = {1: 3, 2: 5, 3: 1}
"""By ranks. A rank has 4 micro-batches, 1 with all of its rows, and 4 of one row."""
SMALL = {"model__hidden_size": 24, "model__intermediate_size": 24}
"""Leaves columns of the virtual matrix for a second feed-forward pair."""
RECIPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "generated": (
        (0, 1, 2),
        MUON
        | MASKS
        | SMALL
        | {"model__init_scale": 0.35, "model__branch_gain": 0.5, "model__learned_branch_gains": True}
        | {"model__ffn_pairs": 2, "data__row_length__first": 8, "schedule__decay": "wsd"}
        | {"optimizer__ema__decay": 0.9, "validate__ema": True},
    ),
    "matrices": (
        (0, 1, 2),
        {"model__sharing": "none", "optimizer__muon__matrices": True, "optimizer__groups__head__clip": 1e-3}
        | {"optimizer__groups__word_embeddings__lr_factor": 2.0, "optimizer__tuned_width": 16}
        | {"optimizer__ema__decay": 0.9, "optimizer__ema__start": 8, "validate__ema": True},
    ),
    "layers": (
        (0, 2),
        {"model__sharing": "layers", "model__init_scale": 0.35, "model__branch_gain": 0.5, "schedule__decay": "cosine"}
        | {"data__row_length__first": 8, "data__row_length__growth": "jump"}
        | {"optimizer__muon__matrices": True, "optimizer__muon__scale": "match_rms_adamw", "optimizer__muon__lr": 3e-3}
        | {"optimizer__muon__weight_decay": 0.1},
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
HALF = "generated"
"""The recipe that is trained in bf16 as well."""


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All recipes on 1, 2 and 3 ranks at their stages, and resumed: on 2 ranks from step 14, and on 3 from step 7, when
    rows are still short and `matrices` has no average yet. One recipe in bf16 on 2 ranks, and resumed."""
    top = tmp_path_factory.mktemp("options")
    for ranks in (1, 2, 3):
        plan: list[dict[str, Any]] = []
        for recipe, (stages, keys) in RECIPES.items():
            folder, given = top / recipe, COMMON | keys | {"data__micro_batch": MICRO_BATCH[ranks]}
            for stage in stages:
                run = folder / f"{ranks}-{stage}"
                plan.append({"overrides": train_arguments(dataset, run, **given, zero__stage=stage)})
            last = stages[-1]
            resumed = {2: (("more", f"1-{last}", 14), ("again", f"2-{last}", 14)), 3: (("short", f"1-{last}", 7),)}
            for name, source, step in resumed.get(ranks, ()):
                overrides = train_arguments(dataset, folder / name, **given, zero__stage=last)
                plan.append({"overrides": overrides, "copy": [str(folder / source), step]})
        if ranks == 2:
            given = COMMON | RECIPES[HALF][1] | {"data__micro_batch": 3, "precision": "bf16", "zero__stage": 2}
            plan.append({"overrides": train_arguments(dataset, top / "bf16" / "whole", **given)})
            resumed = train_arguments(dataset, top / "bf16" / "resumed", **given)
            plan.append({"overrides": resumed, "copy": [str(top / "bf16" / "whole"), 7]})
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


@pytest.mark.slow
def test_in_bf16_a_resume_repeats_every_bit(runs: Path) -> None:
    """And the losses are those of fp32, as far as bf16 goes."""
    half, resumed, full = runs / "bf16" / "whole", runs / "bf16" / "resumed", runs / HALF / "2-2"
    assert len(losses(half)) == 20
    assert losses(half) != losses(full)
    assert losses(half) == pytest.approx(losses(full), rel=1e-3)
    assert read_state(resumed)["resumed_from"] == 7
    assert losses(resumed) == losses(half)
    assert validation_losses(resumed) == validation_losses(half)
    last, again = whole(half, 20), whole(resumed, 20)
    for name in last.manifest["shapes"]:
        for state in (*STATES, EMA):
            assert torch.equal(read_whole(last, name, state), read_whole(again, name, state)), (name, state)


def validation_losses(run: Path) -> list[float]:
    """The loss of each validation."""
    return [line["valid_loss"] for line in log_of(run) if "valid_loss" in line]
