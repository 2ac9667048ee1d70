"""The recipes of the comparison that ships: they parse, and their models have the sizes that the docs say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from comparison.recipe import CompareRecipe
from comparison.rows import checked
from compress.recipe import CompressRecipe
from compress.steps import step_of
from pretrain.recipe import TrainRecipe
from sharebert import ShareBertForMaskedLM
from sharebert_common.recipe import CONFIGS, load

PAGE = Path(__file__).parents[2] / "docs" / "comparison.md"

V, P = 4_096, 64

SHAPES = {
    "bert": (128, 256, 2, 128, 2),
    "albert": (128, 256, 2, 32, 1),
    "tinybert": (64, 128, 1, 64, 1),
    "veps": (128, 256, 2, 32, 0),
    "eps": (128, 256, 2, 128, 0),
}
"""Recipe → H, I, L, F, and how many sets of matrices are parameters."""


def by_hand(name: str) -> tuple[int, int]:
    """The parameters without the head, and those of the tied head."""
    hidden, inner, layers, factor, sets = SHAPES[name]
    embedding = V * factor + 2 * hidden + (P + 2) * hidden  # E, a norm, positions and types
    if name != "eps":
        embedding += 2 * factor + hidden * factor + hidden  # the norm before the projection, and the projection
    if name == "veps":
        embedding += hidden * factor + hidden  # W_all and its bias
    own = sets * (4 * hidden**2 + 2 * hidden * inner) + (hidden**2 if sets else 0)  # with the pooler's matrix
    biases = layers * (9 * hidden + inner) + 3 * hidden  # two norms and five biases of H a layer; last norm, pooler
    return embedding + own + biases, hidden * factor + factor + 2 * factor + V


def recipe(name: str) -> TrainRecipe:
    return load(TrainRecipe, f"compare/{name}", ["model.vocab_size=4096"])


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_page(name: str) -> None:
    with torch.device("meta"):
        model = ShareBertForMaskedLM(recipe(name).resolve(needs_data=False).model.config)
    encoder = sum(p.numel() for p in model.sharebert.parameters())
    whole = sum(p.numel() for p in model.parameters())
    assert (encoder, whole - encoder) == by_hand(name)
    assert re.search(rf"^\| `configs/compare/{name}\.yaml` \|.*\| {encoder:,} \| {whole:,} \|$", PAGE.read_text(), re.M)


def test_the_models_differ_in_what_they_are_and_in_nothing_else() -> None:
    """The same rows, steps, masks, learning rate and head for all; TinyBERT alone is smaller, and has a teacher."""
    for name in SHAPES:
        ours, bert = recipe(name), recipe("bert")
        assert ours.model.mlm_head == "tied"
        assert ours.data == bert.data
        assert (ours.steps, ours.optimizer, ours.schedule) == (bert.steps, bert.optimizer, bert.schedule)
        assert ours.steps * ours.data.global_batch * 32 == 10_240_000
        if name != "tinybert":
            assert (ours.model.hidden_size, ours.model.num_hidden_layers) == (128, 2)
    assert recipe("tinybert").distill.attention > 0
    assert recipe("tinybert").model.num_attention_heads == recipe("bert").model.num_attention_heads


def test_the_table_has_every_kind_of_row(tmp_path: Path) -> None:
    asked = load(CompareRecipe, "compare/table")
    trained = {row.train for row in asked.rows.values() if row.train}
    assert trained == {f"compare/{name}" for name in SHAPES}
    compressed = {row.compress for row in asked.rows.values() if row.compress}
    assert compressed >= {"compress/fastest", "compress/smallest", "compress/pruned-pc-lora", "compress/pc-lora"}
    assert set(asked.tasks) == {"sst2", "mrpc", "rte", "stsb"}
    assert len(asked.seeds) == 5
    assert all(row.teacher == "bert" for row in asked.rows.values() if row.teacher)


def test_the_table_is_right_for_a_dataset_of_32_tokens(dataset: Path, tmp_path: Path) -> None:
    """A tiny vocabulary leaves no room for H 128; with a width that fits, all rows are accepted."""
    overrides = [f"dataset={dataset}", f"folder={tmp_path}"]
    narrow = {"model.hidden_size": 32, "model.intermediate_size": 48}
    asked = load(CompareRecipe, "compare/table", overrides)
    for name, row in asked.rows.items():
        if row.train:
            row.keys |= {**narrow, "model.factor_size": 32 if name in ("eps", "bert") else 8}
    rows = checked(asked)
    assert [row.name for row in rows] == list(asked.rows)
    fastest = next(row for row in rows if row.name == "veps-fastest")
    assert fastest.before is not None
    assert fastest.after is not None
    assert [step_of(step, "")[0] for step in fastest.before.steps] == ["distil", "prune_structure"]
    assert [step_of(step, "")[0] for step in fastest.after.steps] == ["onnx", "onnx_int8"]
    assert fastest.before.teacher == str(tmp_path / "exports" / "bert")


@pytest.mark.parametrize("file", sorted((CONFIGS / "compress").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_compress_recipe_parses(file: Path) -> None:
    for number, step in enumerate(load(CompressRecipe, file).steps):
        step_of(step, f"steps.{number}")
