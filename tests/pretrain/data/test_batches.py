"""Micro-batches have a fixed shape, point at the tokens they mean, and say what only fills them up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numbered import SEQ_LEN, SPECIAL_IDS, numbered_dataset, numbers_of, originals, rows_saying

from data_prep.shards.reader import Dataset
from pretrain.data.batches import Batcher, MicroBatch
from sharebert_common.errors import BadInput


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return numbered_dataset(tmp_path_factory.mktemp("data") / "dataset", [30, 20])


def make(dataset: Dataset, rows: np.ndarray, counts: np.ndarray | None = None, micro_rows: int = 4) -> list[MicroBatch]:
    batcher = Batcher([dataset], "train", mask_rate=0.3, whole_word=False, seed=1)
    zeros = np.zeros_like(rows)
    every = np.ones(len(rows), bool) if counts is None else counts
    return batcher.make(zeros, zeros, rows, counts=every, micro_rows=micro_rows, hide="mixed")


def test_shapes_and_types(dataset: Dataset) -> None:
    batches = make(dataset, np.arange(8))
    assert len(batches) == 2
    for batch in batches:
        assert (batch.tokens.shape, batch.tokens.dtype) == ((4, SEQ_LEN), torch.int64)
        assert (batch.document_ids.shape, batch.document_ids.dtype) == ((4, SEQ_LEN), torch.uint8)
        for tensor, dtype in (
            (batch.positions, torch.int64),
            (batch.labels, torch.int64),
            (batch.loss_weights, torch.float32),
        ):
            assert (tensor.shape, tensor.dtype) == ((4 * round(0.3 * SEQ_LEN),), dtype)
            assert tensor.is_contiguous()


def test_labels_stand_where_positions_say(dataset: Dataset) -> None:
    rows = np.array([49, 3, 31, 3, 12, 0, 7, 29])
    batches = make(dataset, rows)
    whole = np.concatenate([originals(batch) for batch in batches])
    np.testing.assert_array_equal(numbers_of(whole), rows)
    tokens, document_ids = rows_saying(rows)
    np.testing.assert_array_equal(whole, tokens)
    np.testing.assert_array_equal(np.concatenate([batch.document_ids.numpy() for batch in batches]), document_ids)
    for batch in batches:
        unused = batch.loss_weights == 0
        assert not batch.positions[unused].any()
        assert not batch.labels[unused].any()


def test_padded_says_whether_there_is_padding(dataset: Dataset) -> None:
    full, short = [1, 2, 3, 4], [1, 2, 3, 5]
    assert [batch.padded for batch in make(dataset, np.array(full + short))] == [False, True]


def test_filling_rows_have_no_weight_and_are_ordinary_input(dataset: Dataset) -> None:
    rows, counts = np.array([1, 2, 3, 6, 7, 7, 7, 7]), np.arange(8) < 5
    first, second = make(dataset, rows, counts)
    assert (first.loss_weights.view(4, -1).sum(dim=1) > 0).all()
    assert (second.loss_weights.view(4, -1).sum(dim=1) > 0).tolist() == [True, False, False, False]
    assert (second.tokens[1:] == second.tokens[0]).all()
    assert (second.document_ids != 0).all()
    assert not second.positions.view(4, -1)[1:].any()


def test_to_moves_every_tensor(dataset: Dataset) -> None:
    (batch,) = make(dataset, np.arange(4))
    moved = batch.to(torch.device("meta"))
    assert moved.padded == batch.padded
    for name in ("tokens", "document_ids", "positions", "labels", "loss_weights"):
        assert getattr(moved, name).device.type == "meta"


def test_wide_segments_become_int32(tmp_path: Path) -> None:
    from data_prep.shards.format import write_manifest
    from data_prep.shards.reader import open_dataset
    from data_prep.shards.shard_file import write_shard

    dataset = numbered_dataset(tmp_path / "dataset", [8])
    tokens, document_ids = rows_saying(np.arange(1, 5))
    wide = write_shard(dataset.path, "train/shard-000000.tar", [(tokens, document_ids.astype(np.uint16) * 700)])
    splits = dataset.manifest["splits"] | {"train": {"rows": 4, "shards": [wide]}}
    splits["validation"]["shards"] = []
    entries = {k: v for k, v in dataset.manifest.items() if k not in ("format", "fingerprint")}
    write_manifest(dataset.path, entries | {"segments_dtype": "uint16", "splits": splits})
    (batch,) = make(open_dataset(dataset.path), np.arange(4))
    assert batch.document_ids.dtype == torch.int32
    assert batch.document_ids.max() == 700


def test_a_token_outside_the_vocabulary_is_a_damaged_dataset(tmp_path: Path) -> None:
    dataset = numbered_dataset(tmp_path / "dataset", [8], vocab_size=40)
    with pytest.raises(BadInput, match=r"dataset: .*train split.*vocabulary of 40.*damaged"):
        make(dataset, np.arange(4))


def test_whole_words_are_kept_together(dataset: Dataset) -> None:
    """Ids from 80 on continue words (`##`): one is masked only if the token it continues is masked too."""
    rows = np.arange(40)
    zeros, counts = np.zeros_like(rows), np.ones(40, bool)
    batcher = Batcher([dataset], "train", mask_rate=0.3, whole_word=True, seed=1)
    (batch,) = batcher.make(zeros, zeros, rows, counts=counts, micro_rows=40, hide="mixed")
    whole = originals(batch)
    hit = np.zeros(whole.size, bool)
    hit[batch.positions.numpy()[batch.loss_weights.numpy() > 0]] = True
    hit = hit.reshape(whole.shape)
    continued = hit[:, 1:] & (whole[:, 1:] >= 80) & ~np.isin(whole[:, :-1], list(SPECIAL_IDS.values()))
    assert continued.sum() > 10
    assert hit[:, :-1][continued].all()
