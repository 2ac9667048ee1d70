"""The same run on other numbers of ranks, at other ZeRO stages and with other micro-batches: the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from tiny_runs import log_of, losses, train_arguments, train_many, whole

from pretrain.checkpoint import format as checkpoint
from pretrain.engine.fragments import STATES
from pretrain.run.metric_log import EVENTS_FILE

pytestmark = pytest.mark.slow

STEPS = 200
BARS = {"fp32": 2e-6, "bf16": 2e-3}
"""Largest relative difference of a loss from that of the undisturbed run."""

LAUNCHES = [(2, 2, 5), (1, 3, 10), (4, 1, 2), (3, 0, 3)]
"""Ranks, ZeRO stage and micro-batch; each makes a quarter of the steps."""


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each precision: `whole`, 200 steps on one rank; `moved`, through all launches; `dropout`, two launches."""
    folder = tmp_path_factory.mktemp("elastic")
    said = []
    for number, (world_size, stage, micro_batch) in enumerate(LAUNCHES):
        plan: list[dict[str, Any]] = []
        for precision in BARS:
            keys = {"steps": STEPS, "precision": precision}
            moved = {**keys, "zero__stage": stage, "data__micro_batch": micro_batch, "checkpoint__keep": 9}
            given = train_arguments(dataset, folder / f"moved-{precision}", **moved)
            if number:
                plan.append({"overrides": given, "save_again": True})
            plan.append({"overrides": given, "stop_after": STEPS // len(LAUNCHES)})
            if world_size == 1:
                plan.append({"overrides": train_arguments(dataset, folder / f"whole-{precision}", **keys)})
        if number < 2:
            given = train_arguments(dataset, folder / "dropout", steps=20, model__hidden_dropout_prob=0.1, seed=4)
            plan.append({"overrides": given, "stop_after": 10})
        said.append(train_many(plan, world_size, folder))
    (folder / "said").write_text("\n".join(said))
    return folder


@pytest.mark.parametrize("precision", BARS)
def test_the_losses_are_those_of_the_undisturbed_run(runs: Path, precision: str) -> None:
    moved, reference = losses(runs / f"moved-{precision}"), losses(runs / f"whole-{precision}")
    assert len(moved) == len(reference) == STEPS
    assert mean(reference[-20:]) < mean(reference[:20]) - 0.3, "it did not learn, so equal losses say nothing"
    assert max(abs(a - b) / b for a, b in zip(moved, reference, strict=True)) <= BARS[precision]
    assert [line["rows"] for line in log_of(runs / f"moved-{precision}")] == list(range(10, 10 * STEPS + 1, 10))


@pytest.mark.parametrize("precision", BARS)
@pytest.mark.parametrize("launch", range(1, len(LAUNCHES)))
def test_what_is_loaded_is_bitwise_what_was_saved(runs: Path, precision: str, launch: int) -> None:
    step = launch * STEPS // len(LAUNCHES)
    run = runs / f"moved-{precision}"
    saved, again = whole(run, step), whole(run, step, "again")
    assert (saved.world_size, again.world_size) == (LAUNCHES[launch - 1][0], LAUNCHES[launch][0])
    assert saved.manifest["shapes"] == again.manifest["shapes"]
    for name in saved.manifest["shapes"]:
        for state in STATES:
            one, other = (checkpoint.read_whole(c, name, state) for c in (saved, again))
            assert torch.equal(one, other), f"{state} of {name}"


def test_dropout_on_other_ranks_is_seeded_anew_and_the_log_says_so(runs: Path) -> None:
    said = (runs / "said").read_text()
    assert "checkpoint of 2 ranks on 1: dropout is seeded anew from (seed 4, step 10, rank)" in said
    assert len(losses(runs / "dropout")) == 20


def test_a_stop_that_only_another_rank_saw_is_noted_with_its_reason(runs: Path) -> None:
    for run in ("dropout", "moved-fp32"):
        events = [json.loads(line)["text"] for line in (runs / run / EVENTS_FILE).read_text().splitlines()]
        stops = [text for text in events if text.startswith("stopped")]
        assert stops
        assert set(stops) == {"stopped: signal SIGTERM"}
