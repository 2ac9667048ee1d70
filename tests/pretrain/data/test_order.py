"""Every row once an epoch, in an order that any reader of docs/format.md finds too, at no cost in memory."""

from __future__ import annotations

import time
import tracemalloc
from collections import OrderedDict

import format_by_hand as by_hand
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import ROUNDS, Order, permute
from sharebert_common.counter_rng import Stream, draw, key

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


def round_keys(seed: int) -> np.ndarray:
    return draw(key(seed, Stream.ROWS, 0, 0)[:, None], np.arange(ROUNDS))


@pytest.mark.parametrize("vector", by_hand.vectors("order"))
def test_vectors_of_the_document(vector: dict) -> None:
    order = Order(vector["shard_rows"], vector["seed"], vector["window_shards"])
    positions = np.arange(vector["first"], vector["first"] + len(vector["rows"]))
    assert order.at(positions)[1].tolist() == vector["rows"]


@settings(deadline=None)
@given(shard_rows=SHARDS, window_shards=st.integers(1, 14), seed=st.integers(0, 2**64 - 1), far=st.integers(0, 10**12))
def test_equals_the_transcription(shard_rows: list[int], window_shards: int, seed: int, far: int) -> None:
    order = Order(shard_rows, seed, window_shards)
    positions = np.array([0, 1, sum(shard_rows) - 1, sum(shard_rows), far, far + 1])
    epochs, rows = order.at(positions)
    assert list(zip(epochs.tolist(), rows.tolist(), strict=True)) == [
        by_hand.row_at(shard_rows, seed, window_shards, int(p)) for p in positions
    ]


@settings(deadline=None)
@given(shard_rows=SHARDS, window_shards=st.integers(1, 14), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6))
def test_every_row_once_an_epoch(shard_rows: list[int], window_shards: int, seed: int, epoch: int) -> None:
    order = Order(shard_rows, seed, window_shards)
    positions = np.arange(epoch * order.rows, (epoch + 1) * order.rows)
    epochs, rows = order.at(positions)
    assert (epochs == epoch).all()
    np.testing.assert_array_equal(np.sort(rows), np.arange(order.rows))


@settings(deadline=None)
@given(shard_rows=SHARDS, cut=st.integers(0, 60))
def test_asking_at_once_or_in_two_parts_is_the_same(shard_rows: list[int], cut: int) -> None:
    positions = np.arange(60)
    whole = Order(shard_rows, 1, 3).at(positions)
    order = Order(shard_rows, 1, 3)
    later = order.at(positions[cut:])
    earlier = order.at(positions[:cut])
    for a, b, c in zip(whole, earlier, later, strict=True):
        np.testing.assert_array_equal(a, np.concatenate([b, c]))


def test_epochs_and_seeds_differ() -> None:
    rows = [
        Order([500] * 4, seed, 2).at(np.arange(epoch * 2000, epoch * 2000 + 2000))[1]
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    for i in range(4):
        for j in range(i):
            assert (rows[i] == rows[j]).mean() < 0.01


@pytest.mark.parametrize("size", [3, 4, 5, 6, 7, 12, 30, 64])
def test_images_of_two_rows_are_jointly_uniform(size: int) -> None:
    draws = 60 * size * size
    keys = draw(key(1, Stream.ROWS, 0, np.arange(draws))[:, None], np.arange(ROUNDS))
    sizes = np.full(draws, size)
    for i, j in ((0, 1), (0, size - 1), (size // 2, size - 1)):
        images = permute(np.full(draws, i), sizes, keys) * size + permute(np.full(draws, j), sizes, keys)
        counts = np.bincount(images, minlength=size * size)[~np.eye(size, dtype=bool).ravel()]
        expected = draws / len(counts)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < len(counts) + 5 * np.sqrt(2 * len(counts))


def test_a_large_permutation_keeps_no_trace_of_the_order() -> None:
    size = 100_000
    image = permute(np.arange(size), np.full(size, size), np.repeat(round_keys(1), size, axis=0))
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 4 / np.sqrt(size)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 4 / np.sqrt(size)
    assert (np.diff(image) == 1).sum() < 12  # one in `size` is expected by chance


def test_an_epoch_reads_each_shard_once_through_a_small_cache() -> None:
    shard_rows, window_shards, global_batch = [200] * 60, 6, 640
    order = Order(shard_rows, 3, window_shards)
    cache: OrderedDict[int, None] = OrderedDict()
    loads = 0
    for start in range(0, order.rows, global_batch):
        shards = np.unique(order.at(np.arange(start, min(start + global_batch, order.rows)))[1] // 200)
        assert len(shards) <= 2 * window_shards
        for shard in shards:
            loads += shard not in cache
            cache[shard] = None
            cache.move_to_end(shard)
            while len(cache) > 2 * window_shards:
                cache.popitem(last=False)
    assert loads == len(shard_rows)


def test_a_window_is_mixed_whole() -> None:
    """The first tenth of a window has rows of every shard of it, as evenly as chance would have it."""
    order = Order([1000] * 40, 3, 8)
    shards, counts = np.unique(order.at(np.arange(800))[1] // 1000, return_counts=True)
    assert len(shards) == 8
    assert abs(counts - 100).max() < 5 * 10


def test_cost_does_not_depend_on_the_number_of_rows() -> None:
    peaks = {}
    for shard_rows in (1_000, 1_000_000):  # a million and a thousand million rows
        tracemalloc.start()
        started = time.perf_counter()
        order = Order([shard_rows] * 1000, 5, 16)
        for position in (0, order.rows // 3, 10**15):
            epochs, rows = order.at(np.arange(position, position + 4000))
            assert len(np.unique(rows)) == 4000
            assert (epochs == position // order.rows).all()
        assert time.perf_counter() - started < 1
        peaks[shard_rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[1_000_000] < 1.1 * peaks[1_000] < 4e6
