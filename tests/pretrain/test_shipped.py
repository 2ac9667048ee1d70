"""The shipped recipes of real sizes, and the authors' beside them."""

from __future__ import annotations

import dataclasses

import pytest

from pretrain.data.mask_schedule import MaskScheduleRecipe
from pretrain.recipe import TrainRecipe
from sharebert import SIZES
from sharebert_common.recipe import load

PAPER = {
    "global_batch": 4000,
    "steps": 23_000,
    "lr": 1e-3,
    "betas": (0.9, 0.98),
    "eps": 1e-6,
    "weight_decay": 0.01,
    "clip": 0.5,
    "warmup": 0.06,
    "decay": "linear",
    "final": 0.0,
    "mask_rate": 0.15,
    "seed": 42,
}
"""What the authors' README and code give, by our names; configs/authors.yaml has the place of each."""


def test_the_authors_recipe_is_theirs() -> None:
    recipe = load(TrainRecipe, "authors", ["model.vocab_size=30522", "precision=fp32"])
    flat = {}
    for part in (recipe, recipe.data, recipe.optimizer, recipe.schedule):
        flat |= {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    assert {key: flat[key] for key in PAPER} == PAPER
    choice = recipe.resolve(needs_data=False).model
    assert (choice.init, choice.init_scale, choice.config.attention_scale) == ("authors", None, "authors")
    assert (choice.config.hidden_dropout_prob, choice.config.attention_probs_dropout_prob) == (0.1, 0.1)
    assert choice.config.mlm_head == "untied"
    assert recipe.data.row_length.first is None


@pytest.mark.parametrize("size", SIZES)
def test_a_size_differs_from_the_authors_in_start_masks_and_rows_alone(size: str) -> None:
    """So that what docs/recipe.md says of the shipped sizes is all that differs."""
    keys = ["run=x", f"model.size={size}", "model.vocab_size=30522", "seed=0", "precision=fp32"]
    theirs, ours = (load(TrainRecipe, name, keys) for name in ("authors", size))
    assert ours.data.row_length.first == 8
    assert (ours.data.mask_rate, ours.data.mask_schedule) == (0.3, MaskScheduleRecipe(last_rate=0.15))
    masks = {"mask_rate": theirs.data.mask_rate, "mask_schedule": theirs.data.mask_schedule}
    assert dataclasses.replace(ours.data, row_length=theirs.data.row_length, **masks) == theirs.data
    same = ("optimizer", "schedule", "steps", "zero", "checkpoint", "validate", "faults", "distill", "quantise")
    assert all(getattr(ours, key) == getattr(theirs, key) for key in same)
    made, before = (recipe.resolve(needs_data=False).model for recipe in (ours, theirs))
    assert (made.init, made.init_scale, made.config.attention_scale) == ("variance", 0.23, "standard")
    assert dataclasses.replace(made.config, attention_scale="authors") == before.config
