"""Hard-concrete gates and their training, against formulas by hand."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
import torch
from compress_models import tokens_of
from tiny_models import tiny_model

from compress.calibrate import Batch
from compress.prune.gate_training import GateTraining
from compress.prune.hard_concrete import open_probability, sampled, settled
from compress.prune.latency_table import LatencyTable, Shape
from compress.prune.structure_search import Structure
from compress.shape_times import Call

ALPHA = torch.tensor([-3.0, -1.0, 0.0, 0.7, 4.0])

TABLE = LatencyTable(Shape(3, 40, 2), Call(1, 8, 1), 10.0, {1: 8.0, 3: 10.0}, {5: 6.5, 40: 10.0}, {1: 6.0, 2: 10.0})


def test_gates_are_those_of_the_paper() -> None:
    uniform = torch.tensor([0.1, 0.5, 0.9, 0.2, 0.6])
    found = sampled(ALPHA, uniform)
    for gate, alpha, u in zip(found.tolist(), ALPHA.tolist(), uniform.tolist(), strict=True):
        s = 1 / (1 + exp(-(log(u) - log(1 - u) + alpha) / (2 / 3)))
        assert gate == pytest.approx(min(1.0, max(0.0, s * 1.2 - 0.1)), abs=1e-6)
    by_numpy = np.clip(1.2 / (1 + np.exp(-ALPHA.numpy())) - 0.1, 0, 1)
    np.testing.assert_allclose(settled(ALPHA), by_numpy, rtol=1e-6)


def test_the_expected_l0_norm_is_the_share_of_gates_that_are_not_0() -> None:
    uniform = torch.rand(100_000, 5, generator=torch.Generator().manual_seed(0))
    counted = (sampled(ALPHA, uniform) > 0).float().mean(0)
    found = open_probability(ALPHA)
    torch.testing.assert_close(counted, found, rtol=0, atol=5e-3)
    by_hand = [1 / (1 + exp(-(alpha - 2 / 3 * log(0.1 / 1.1)))) for alpha in ALPHA.tolist()]
    assert found.tolist() == pytest.approx(by_hand)


def gates(target: float = 0.5, task_weight: float = 1.0) -> GateTraining:
    head = {"mlm_head": "tied", "num_attention_heads": 3}
    return GateTraining(tiny_model(**head).eval(), tiny_model(**head).eval(), TABLE, target, task_weight, 0)


def test_the_penalty_is_that_of_both_multipliers() -> None:
    training = gates()
    with torch.no_grad():
        training.multipliers.copy_(torch.tensor([3.0, 7.0]))
        for alpha in training.alphas:
            alpha.fill_(0.0)
    p = float(open_probability(torch.tensor(0.0)))
    # 4 ms a layer and 2 for the rest; all of a layer's heads but one are 1 ms, a column is 0.05 ms
    saved = (3 * (1 - p) * 0.5) + (40 * (1 - p) * 0.05)
    over = (2 + 2 * p * (4 - saved)) / 10 - 0.6
    assert training.penalty(0.6).item() == pytest.approx(3 * over + 7 * over**2, rel=1e-5)
    training.penalty(0.6).backward()  # type: ignore[no-untyped-call]
    assert training.multipliers.grad is not None
    assert training.multipliers.grad.tolist() == pytest.approx([over, over**2], rel=1e-5)
    assert all(alpha.grad is not None and (alpha.grad != 0).all() for alpha in training.alphas)


def test_factors_are_the_gates_without_chance() -> None:
    training = gates()
    with torch.no_grad():
        training.alphas[0].copy_(torch.tensor([3.0, 0.5, -3.0]))
    kept = training.with_factors(Structure([1, 2], [0, 7], [1]))
    assert kept.heads.tolist()[0] == pytest.approx([0, float(settled(torch.tensor(0.5))), 1])
    assert kept.columns.nonzero()[:, 1].tolist() == [0, 7]
    assert kept.layers.tolist() == [[0, 1]]


def test_the_distance_to_the_whole_model_is_part_of_the_loss() -> None:
    training = gates(task_weight=0.0)
    tokens = tokens_of(training.model.config)
    batch = Batch(tokens, torch.ones_like(tokens), torch.full_like(tokens, -100))
    whole = [torch.ones(1, count) for count in TABLE.whole]
    assert float(training.loss(batch, *whole)) == pytest.approx(0, abs=1e-10)
    assert float(training.loss(batch, torch.zeros(1, 3), *whole[1:])) > 1e-4
    first, again, other = (training.gates(2, step) for step in (5, 5, 6))
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[1].equal(other[1])
