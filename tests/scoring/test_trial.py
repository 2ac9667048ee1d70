"""Which of several fine-tunings is kept: that with the best rate, and of its seeds the one that is best on dev."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scoring import trial
from scoring.finetune import Diverged
from scoring.recipe import EvaluateRecipe, FineTuneRecipe
from scoring.trial import Trial

SCORES = {(0.1, 1): 0.5, (0.2, 1): 0.6, (0.2, 2): 0.9, (0.2, 3): 0.7, (0.1, 2): 1.0}
"""On dev, by rate and seed; on test they are the other way round."""


class Fits(Trial):
    """Fine-tunings without any work: a classifier is its rate and its seed."""

    def fit(self, lr: float, seed: int) -> tuple[Any, Any, float]:
        if lr > 1:
            raise Diverged("the loss is nan")
        score = SCORES[lr, seed]
        name = SimpleNamespace(name=(lr, seed), parameters=1, trained=None, nbytes=4, predict=len)
        return name, {"dev": {"accuracy": score}, "test": {"accuracy": 1 - score}}, 1.0


def ran(seeds: list[int], lr: list[float]) -> tuple[Any, Any]:
    recipe = EvaluateRecipe(task="mine", seeds=seeds, finetune=FineTuneRecipe(lr=lr))
    task: Any = SimpleNamespace(name="mine")
    split = SimpleNamespace(texts=[("x",)])
    data: Any = SimpleNamespace(task=task, dev=["dev"], held_out={"dev": split, "test": split}, train=[], skipped={})
    encoder: Any = SimpleNamespace(spec="model", unused_settings=frozenset())
    return Fits(recipe, data, encoder, {}, torch.device("cpu"), None).run()  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "latency_ms", lambda *_: 1.0)


@pytest.mark.parametrize("seeds", [[1, 2, 3], [2, 1, 3], [3, 1, 2]])
def test_the_classifier_of_the_seed_that_is_best_on_dev_is_kept(seeds: list[int]) -> None:
    result, best = ran(seeds, [0.2])
    assert best.name == (0.2, 2)
    assert result.scores["dev"]["accuracy"] == [SCORES[0.2, seed] for seed in seeds]
    assert result.seeds == seeds


def test_the_first_seed_chooses_the_rate() -> None:
    """Later seeds have that rate, also where another would have served them better."""
    result, best = ran([1, 2], [0.1, 0.2, 5.0])
    assert result.lr == 0.2
    assert result.sweep == {"0.1": 0.5, "0.2": 0.6, "5": None}
    assert best.name == (0.2, 2)
    with pytest.raises(Diverged, match="not finite with any learning rate"):
        ran([1], [5.0, 6.0])
