"""`recompute` and `compile` through whole runs on two ranks: the losses are those of a run without."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import losses, train_arguments, train_many

pytestmark = pytest.mark.slow

DROPOUT = {"model__hidden_dropout_prob": 0.1, "model__attention_probs_dropout_prob": 0.1}
RUNS: dict[str, dict[str, Any]] = {
    "plain": DROPOUT,
    "recompute": {**DROPOUT, "recompute": True},
    "plain-zero-3": {**DROPOUT, "zero__stage": 3},
    "recompute-zero-3": {**DROPOUT, "recompute": True, "zero__stage": 3},
    "still": {"zero__stage": 2},
    "compile": {"zero__stage": 2, "compile": True},
}


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of two ranks, in one launch."""
    folder = tmp_path_factory.mktemp("options")
    chosen = {name: keys for name, keys in RUNS.items() if name != "compile" or shutil.which("g++")}
    plan = [{"overrides": train_arguments(dataset, folder / name, **keys)} for name, keys in chosen.items()]
    train_many(plan, 2, folder)
    return folder


@pytest.mark.parametrize("stage", ["", "-zero-3"])
def test_what_is_made_again_is_what_was_made_dropout_included(runs: Path, stage: str) -> None:
    assert losses(runs / f"recompute{stage}") == losses(runs / f"plain{stage}")


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler on a CPU; install g++")
def test_compiled_layers_train_alike(runs: Path) -> None:
    assert losses(runs / "compile") == pytest.approx(losses(runs / "still"), rel=1e-5)
