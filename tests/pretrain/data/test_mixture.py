"""A mixture holds its weights everywhere, and is found at any position."""

from __future__ import annotations

import format_by_hand as by_hand
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.mixture import SLOTS, Mixture

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8)


@pytest.mark.parametrize("vector", by_hand.vectors("mixture"))
def test_vectors_of_the_document(vector: dict) -> None:
    mixture = Mixture(vector["weights"])
    assert mixture.slots.tolist() == vector["slots"]
    assert mixture.at(np.arange(len(vector["pattern"])))[0].tolist() == vector["pattern"]


def test_equals_the_transcription() -> None:
    for weights in ([1, 2, 5], [0.37, 0.63], [1e-9, 1, 3]):
        mixture = Mixture(weights)
        assert mixture.at(np.arange(mixture.slots.sum()))[0].tolist() == by_hand.pattern(mixture.slots.tolist())


@settings(deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 10**14))
def test_positions_of_each_dataset_follow_each_other(weights: list[float], start: int) -> None:
    mixture = Mixture(weights)
    dataset, places = mixture.at(np.arange(start, start + 3000))
    before, after = mixture.before(start), mixture.before(start + 3000)
    for number in range(len(weights)):
        np.testing.assert_array_equal(places[dataset == number], np.arange(before[number], after[number]))


@settings(deadline=None)
@given(weights=WEIGHTS, start=st.integers(0, 10**6), length=st.integers(1, 5000))
def test_every_stretch_keeps_the_weights(weights: list[float], start: int, length: int) -> None:
    dataset, _ = Mixture(weights).at(np.arange(start, start + length))
    counts = np.bincount(dataset, minlength=len(weights))
    shares = np.array(weights) / sum(weights)
    assert abs(counts - shares * length).max() <= len(weights) + length * len(weights) / SLOTS


def test_a_tiny_weight_still_has_its_turn() -> None:
    assert Mixture([1e-12, 1.0]).slots.tolist() == [1, SLOTS - 1]
