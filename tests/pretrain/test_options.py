"""Options through whole runs on two ranks. With `recompute` and `compile` the losses are those of a run without; short
rows first, branch gains and feed-forward pairs have the same losses under any ZeRO stage and micro-batch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import log_of, losses, train_arguments, train_many

pytestmark = pytest.mark.slow

DROPOUT = {"model__hidden_dropout_prob": 0.1, "model__attention_probs_dropout_prob": 0.1}
TURNS = {
    "data__row_length__first": 8,
    "model__branch_gain": 0.5,
    "model__learned_branch_gains": True,
    "model__ffn_pairs": 2,
    "model__hidden_size": 24,
    "model__intermediate_size": 24,
}
RUNS: dict[str, dict[str, Any]] = {
    "plain": DROPOUT,
    "recompute": {**DROPOUT, "recompute": True},
    "plain-zero-3": {**DROPOUT, "zero__stage": 3},
    "recompute-zero-3": {**DROPOUT, "recompute": True, "zero__stage": 3},
    "still": {"zero__stage": 2},
    "compile": {"zero__stage": 2, "compile": True},
    "turns": {**TURNS, "zero__stage": 0, "validate__every": 20},
    "turns-zero-3": {**TURNS, "zero__stage": 3, "data__micro_batch": 2, "recompute": True, "validate__every": 20},
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


def test_short_rows_gains_and_pairs_train_alike_under_any_stage(runs: Path) -> None:
    first, other = (log_of(runs / name) for name in ("turns", "turns-zero-3"))
    assert losses(runs / "turns-zero-3") == pytest.approx(losses(runs / "turns"), rel=2e-4)
    lengths = [line["row_length"] for line in first if "row_length" in line]
    assert lengths == [8] * 5 + [16] * 5 + [32] * 10
    assert [line["tokens"] for line in first if "tokens" in line] == [320 * step for step in range(1, 21)]
    valid = [[line["valid_loss"] for line in log if "valid_loss" in line] for log in (first, other)]
    assert valid[0] == pytest.approx(valid[1], rel=2e-4)
    assert valid[0][-1] < valid[0][0]
