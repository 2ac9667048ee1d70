"""Short rows first: every token is trained, in pieces, at places that depend on the step alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import format_by_hand as by_hand
import numpy as np
import pytest
import torch
from numbered import SEQ_LEN, VOCAB_SIZE, numbered_dataset

from data_prep.shards.reader import Dataset
from pretrain.data.datasets import DataRecipe
from pretrain.data.loader import Loader, StepBatch
from pretrain.data.row_length import RowLengthRecipe
from pretrain.flops import flops_per_token
from pretrain.objective import MaskedLanguageModelling
from pretrain.plan.estimate import PLAN_DEFAULTS, Assumptions, make_plan
from pretrain.recipe import TrainRecipe
from sharebert import SIZES, ShareBertConfig, ShareBertForMaskedLM, initialize
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load, parse

SHORT = {"first": 3}
"""Rows of 12 tokens: 3, then 6 tokens in a quarter of the run each, then whole rows."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return numbered_dataset(tmp_path_factory.mktemp("data") / "dataset", [50])


def loader_of(dataset: Dataset, rank: int = 0, world_size: int = 1, **keys: Any) -> Loader:
    defaults = {"dataset": "unused", "global_batch": 10, "micro_batch": 4, "prefetch": 3}
    return Loader([dataset], parse(DataRecipe, defaults | keys, "test"), 5, rank, world_size, steps=8)


def steps(loader: Loader, count: int = 8) -> list[StepBatch]:
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_step_has_the_same_tokens_and_masks_in_shorter_rows(dataset: Dataset, world_size: int) -> None:
    for rank in range(world_size):
        short = steps(loader_of(dataset, rank, world_size, row_length=SHORT))
        whole = steps(loader_of(dataset, rank, world_size))
        assert [batch.row_length for batch in short] == [3, 3, 6, 6, 12, 12, 12, 12]
        for ours, theirs in zip(short, whole, strict=True):
            assert (ours.rows, ours.masked, ours.epoch) == (theirs.rows, theirs.masked, theirs.epoch)
            for cut, row in zip(ours.micro_batches, theirs.micro_batches, strict=True):
                assert cut.tokens.shape == (row.tokens.numel() // ours.row_length, ours.row_length)
                for name in ("tokens", "document_ids", "positions", "labels", "loss_weights"):
                    assert torch.equal(getattr(cut, name).flatten(), getattr(row, name).flatten()), name
                at = cut.tokens.flatten()[cut.positions]
                assert torch.equal(at, row.tokens.flatten()[row.positions])


def test_a_resumed_run_has_the_length_of_its_position(dataset: Dataset) -> None:
    later = loader_of(dataset, row_length=SHORT)
    later.load_state({"fingerprint": later.fingerprint, "seed": 5, "rows_consumed": 30})
    found = steps(later, 5)
    assert [batch.row_length for batch in found] == [6, 12, 12, 12, 12]
    skipping = loader_of(dataset, row_length=SHORT)
    skipping.skip(range(10, 20))
    assert [batch.row_length for batch in steps(skipping, 3)] == [3, 6, 6]


def test_the_loss_is_that_of_the_pieces_one_by_one(dataset: Dataset) -> None:
    """Each piece begins at position 0 and sees itself alone; padding stays hidden."""
    config = ShareBertConfig(
        vocab_size=VOCAB_SIZE,
        factor_size=4,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=SEQ_LEN,
        initializer_range=0.5,
    )
    model = ShareBertForMaskedLM(config).double().eval()
    initialize(model, "variance", 0)
    objective = MaskedLanguageModelling(torch.device("cpu"))
    batch = next(step for step in steps(loader_of(dataset, row_length=SHORT)) if step.micro_batches[0].padded)
    micro = batch.micro_batches[0]
    found = objective(model, micro).loss.item()

    chosen = {
        int(place): int(label)
        for place, label, weight in zip(micro.positions, micro.labels, micro.loss_weights, strict=True)
        if weight
    }
    wanted, flat = 0.0, micro.tokens.flatten()
    for start in range(0, len(flat), batch.row_length):
        piece, ids = flat[start : start + batch.row_length], micro.document_ids.flatten()[start : start + len(flat)]
        real = int((ids[: len(piece)] != 0).sum())
        here = {place - start: label for place, label in chosen.items() if start <= place < start + len(piece)}
        if here:
            with torch.no_grad():
                scores = torch.log_softmax(model.logits(piece[None, :real])[0], -1)
            wanted -= sum(scores[place, label].item() for place, label in here.items())
    assert len(chosen) == batch.micro_batches[0].loss_weights.sum()
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("vector", by_hand.vectors("row-lengths"))
def test_vectors_of_lengths(vector: dict[str, Any]) -> None:
    recipe = RowLengthRecipe(**{key: vector[key] for key in ("first", "whole_from", "growth")})
    steps = len(vector["lengths"])
    assert [recipe.at(step / steps, vector["T"]) for step in range(steps)] == vector["lengths"]
    assert recipe.mean(steps, vector["T"]) == np.mean(vector["lengths"])


def test_rows_are_whole_where_nothing_is_said() -> None:
    assert RowLengthRecipe().mean(20, 128) == RowLengthRecipe().at(0.0, 128) == 128


@pytest.mark.parametrize(("seq_len", "growth"), [(100, "jump"), (96, "double")])
def test_rows_that_cannot_be_cut_are_refused(seq_len: int, growth: Any) -> None:
    with pytest.raises(BadInput, match=rf"data\.row_length\.first: 32, but the dataset's rows have {seq_len} tokens"):
        RowLengthRecipe(first=32, growth=growth).check(seq_len)


def test_what_it_cannot_do_is_refused_before_anything_is_built(dataset: Dataset) -> None:
    keys = [f"data.dataset={dataset.path}", "data.global_batch=8", "data.micro_batch=4", "run=none"]
    for more, says in (
        (["data.row_length.first=3", "compile=true"], "data.row_length: not with compile"),
        (
            ["data.row_length.first=3", "distill=somewhere", "distill.cache=cache"],
            r"data\.row_length: not with compile or distill\.cache",
        ),
        (["data.row_length.first=5"], "their number of pieces must be a power of two"),
    ):
        with pytest.raises(BadInput, match=says):
            load(TrainRecipe, None, [*keys, *more]).resolve()


def test_a_plan_counts_the_flops_of_short_rows() -> None:
    """12·L·T·H of attention at the mean length; all else as with whole rows. The tokens are the same."""
    plans = []
    for first in ("null", "32"):
        recipe = load(
            TrainRecipe, "sharebert-small", [f"data.row_length.first={first}", "steps=1000"], defaults=PLAN_DEFAULTS
        )
        plans.append(make_plan(recipe, 8, "h100", Assumptions()))
    whole, short = plans
    mean_length = 0.25 * 32 + 0.25 * 64 + 0.5 * 128
    assert whole.flops_per_token - short.flops_per_token == pytest.approx(12 * 12 * (128 - mean_length) * 2048)
    assert whole.tokens == short.tokens
    config = ShareBertConfig.from_dict(SIZES["sharebert-small"])
    assert flops_per_token(config, 128.0, 0.15, 8192) == flops_per_token(config, 128, 0.15, 8192)


def test_files_of_a_run_may_say_nothing_of_it(tmp_path: Path) -> None:
    """A recipe that was saved before the key existed means whole rows."""
    (tmp_path / "config.yaml").write_text("run: r\ndata: {dataset: d, global_batch: 8, micro_batch: 4}\n")
    assert load(TrainRecipe, tmp_path / "config.yaml").data.row_length.at(0.0, 128) == 128
