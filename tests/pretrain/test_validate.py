"""Validation blocks are fixed, whatever the ranks; the unigram entropy is the one by hand."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import make_dataset
from numbered import SPECIAL_IDS, numbered_dataset, numbers_of, originals, real_rows, rows_saying

from data_prep.shards.reader import Dataset, open_dataset
from pretrain.distributed import Refused
from pretrain.objective import LossSums
from pretrain.validate import Block, ValidateRecipe, rows_of_each, unigram_entropy, validate, validation_blocks
from sharebert_common.errors import BadInput

VALIDATION = [20, 13]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return numbered_dataset(tmp_path_factory.mktemp("data") / "dataset", [5000, 3000], VALIDATION)


def blocks(datasets: list[Dataset], **keys: Any) -> list[Block]:
    return list(validation_blocks(datasets, **({"mask_rate": 0.3, "whole_word": False, "block_rows": 8} | keys)))


def test_every_validation_row_once_in_order_with_mask_everywhere(dataset: Dataset) -> None:
    made = blocks([dataset])
    assert [block.number for block in made] == [0, 1, 2, 3, 4]
    rows = np.concatenate([originals(block.batch)[real_rows(block.batch)] for block in made])
    np.testing.assert_array_equal(numbers_of(rows), np.arange(33))
    for block in made:
        used = block.batch.loss_weights > 0
        assert (block.batch.tokens.flatten()[block.batch.positions[used]] == SPECIAL_IDS["mask"]).all()
        assert len(block.batch.tokens) == 8
        assert (block.batch.document_ids != 0).any(dim=1).all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_ranks_share_the_same_blocks_and_keep_in_step(dataset: Dataset, world_size: int) -> None:
    alone = {block.number: block.batch for block in blocks([dataset])}
    shares = [blocks([dataset], rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    numbers = [block.number for share in shares for block in share if block.number is not None]
    assert sorted(numbers) == list(range(5))
    for block in (block for share in shares for block in share):
        if block.number is None:
            assert not block.batch.loss_weights.any()
        else:
            for name in ("tokens", "document_ids", "positions", "labels", "loss_weights"):
                assert getattr(block.batch, name).equal(getattr(alone[block.number], name))


def test_the_first_rows_alone(dataset: Dataset) -> None:
    made = blocks([dataset], rows=10)
    assert len(made) == 2
    assert [int(real_rows(block.batch).sum()) for block in made] == [8, 2]
    assert made[0].batch.tokens.equal(blocks([dataset])[0].batch.tokens)
    assert len(blocks([dataset], rows=1000)) == 5


def test_hiding_all_leaves_no_word_and_asks_for_the_same(dataset: Dataset) -> None:
    for chosen, everything in zip(blocks([dataset]), blocks([dataset], hide="all"), strict=True):
        for name in ("positions", "labels", "loss_weights", "document_ids"):
            assert getattr(chosen.batch, name).equal(getattr(everything.batch, name))
        assert set(everything.batch.tokens.unique().tolist()) <= {0, 2, 3, 4}


def test_datasets_follow_each_other(dataset: Dataset, tmp_path: Path) -> None:
    other = numbered_dataset(tmp_path / "other", [8], [0, 5, 6])
    made = blocks([dataset, other])
    rows = np.concatenate([originals(block.batch)[real_rows(block.batch)] for block in made])
    np.testing.assert_array_equal(numbers_of(rows), [*range(33), *range(11)])


def test_some_rows_of_several_datasets_are_shared_out_by_weight(dataset: Dataset, tmp_path: Path) -> None:
    """33 and 11 rows; weights of 1 to 3, and what a dataset has not comes from the other."""
    other = numbered_dataset(tmp_path / "other", [8], [0, 5, 6])
    made = blocks([dataset, other], rows=12, weights=[1, 3])
    rows = np.concatenate([originals(block.batch)[real_rows(block.batch)] for block in made])
    np.testing.assert_array_equal(numbers_of(rows), [*range(3), *range(9)])
    held = [33, 11]
    assert rows_of_each(held, [1, 3], 20).tolist() == [9, 11]
    assert rows_of_each(held, [1e9, 1], 40).tolist() == [33, 7]
    assert rows_of_each(held, None, 10).tolist() == [5, 5]
    assert rows_of_each(held, [1, 3], 44).tolist() == rows_of_each(held, [1, 3], None).tolist() == held
    assert rows_of_each([0, 11], [1, 3], 4).tolist() == [0, 4]


def test_no_validation_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="validation split is empty"):
        blocks([numbered_dataset(tmp_path / "dataset", [8], [])])


def test_rows_without_an_ordinary_word_are_refused(tmp_path: Path) -> None:
    words = open_dataset(make_dataset(tmp_path / "dataset", unknown=True))
    nothing = LossSums(torch.zeros(()), torch.zeros(()))
    with pytest.raises(Refused, match="dataset: the validation rows hold no ordinary word"):
        validate(lambda *_: nothing, MagicMock(), [words], ValidateRecipe(), mask_rate=0.15, whole_word=False)


@pytest.mark.parametrize(("split", "rows"), [("train", 8000), ("validation", 33)])
def test_unigram_entropy(dataset: Dataset, split: str, rows: int) -> None:
    tokens, _ = rows_saying(np.arange(rows))
    counts = Counter(token for token in tokens.ravel().tolist() if token not in SPECIAL_IDS.values())
    total = sum(counts.values())
    expected = -sum(count / total * math.log(count / total) for count in counts.values())
    assert unigram_entropy(dataset, split) == pytest.approx(expected, rel=1e-12)


def test_unigram_entropy_of_nothing_is_zero(tmp_path: Path) -> None:
    assert unigram_entropy(numbered_dataset(tmp_path / "dataset", [])) == 0.0
