"""The average of weights against a transcription."""

from __future__ import annotations

from typing import Any

import torch

from pretrain.engine.ema import EmaRecipe, WeightAverage
from pretrain.engine.fragments import EMA


def test_it_is_the_mean_of_the_first_steps_and_then_exponential() -> None:
    weights, state = torch.zeros(7), dict[str, Any]()
    average = WeightAverage(EmaRecipe(decay=0.75, start=2), lambda: [(weights, state)])
    generator = torch.Generator().manual_seed(0)
    seen = []
    for step in range(1, 9):
        weights.copy_(torch.randn(7, generator=generator))
        seen.append(weights.clone())
        average.add(step)
    assert average.steps == 6
    wanted = torch.stack(seen[2:6]).mean(0)  # 1/(1 - 0.75) = 4 steps
    for later in seen[6:]:
        wanted = 0.75 * wanted + 0.25 * later
    torch.testing.assert_close(state[EMA], wanted)


def test_a_swap_and_another_leave_every_bit() -> None:
    weights, state = torch.randn(5), dict[str, Any]()
    average = WeightAverage(EmaRecipe(decay=0.5), lambda: [(weights, state)])
    average.add(1)
    weights.add_(1)
    before = weights.clone(), state[EMA].clone()
    average.swap()
    assert torch.equal(weights, before[1])
    assert torch.equal(state[EMA], before[0])
    average.swap()
    assert torch.equal(weights, before[0])
    assert torch.equal(state[EMA], before[1])
