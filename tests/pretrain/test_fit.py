"""`data.micro_batch: auto`: the search on invented memories, the trial on this CPU, and a run on one and two ranks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import losses, train_arguments, train_many

from pretrain import distributed
from pretrain.data.datasets import micro_shape
from pretrain.plan import fit, trial
from pretrain.plan.command import plan
from pretrain.plan.estimate import PLAN_DEFAULTS, USABLE, Assumptions, largest_rows, make_plan, shape_of
from pretrain.plan.gpus import GPUS
from pretrain.plan.memory import memory
from pretrain.recipe import TrainRecipe
from sharebert import SIZES, ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load, parse, plain

GB = 10**9


class Device:
    """Takes `states` bytes and `row` bytes for each row; more than `memory` ends the process."""

    def __init__(self, memory: float = 80 * GB, states: float = 2 * GB, row: float = 0.1 * GB) -> None:
        self.memory, self.states, self.row, self.tried = memory, states, row, list[int]()

    def __call__(self, rows: int) -> float | None:
        self.tried.append(rows)
        needed = self.states + rows * self.row
        return needed if needed <= self.memory else None


@pytest.mark.parametrize("confirm", [True, False])
@pytest.mark.parametrize(
    ("limit", "most", "expected"), [(73.6, 4000, 716), (73.6, 500, 500), (2.15, 500, 1), (2, 9, 0)]
)
def test_the_last_size_that_fits_is_picked(limit: float, most: int, expected: int, confirm: bool) -> None:
    """(limit - states) / row rows, or the share of a rank; no size that would not fit is ever tried."""
    device = Device()
    rows, taken = fit.largest_that_fits(device, most=most, limit_bytes=limit * GB, confirm=confirm)
    assert rows == expected
    assert taken == pytest.approx(2 * GB + max(1, rows) * 0.1 * GB)
    assert device.tried[:-1] == [2**n for n in range(len(device.tried) - 1)]
    assert max(device.tried) <= max(1, expected)


def test_memory_above_the_line_lowers_the_pick() -> None:
    def bent(rows: int) -> float:
        return (rows if rows <= 64 else 1.3 * rows) * GB

    rows, taken = fit.largest_that_fits(bent, most=1000, limit_bytes=100 * GB, confirm=True)
    assert 64 < rows <= 100 / 1.3
    assert taken == bent(rows) <= 100 * GB


def test_a_device_that_runs_out_early_keeps_the_last_size_that_ran() -> None:
    device = Device(memory=5 * GB)
    assert fit.largest_that_fits(device, most=1000, limit_bytes=70 * GB, confirm=True) == (16, 3.6 * GB)


def test_a_slow_device_is_not_tried_with_large_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second a row: 1, 2 and 4 rows end after 7 seconds, 8 more would end after 15.5."""
    clock, device = [0.0], Device()

    def slow(rows: int) -> float | None:
        clock[0] += rows * 1.05
        return device(rows)

    monkeypatch.setattr(fit.time, "monotonic", lambda: clock[0])
    rows, _ = fit.largest_that_fits(slow, most=4000, limit_bytes=73.6 * GB, confirm=False)
    assert device.tried == [1, 2, 4]
    assert rows == 716


def test_a_control_groups_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free = fit.free_memory()
    assert free > 0
    monkeypatch.setattr(fit, "_control_groups", lambda: [(2e9, 0.5e9), (9e99, 1.0)])
    assert fit.free_memory() == min(free, 1.5e9)
    monkeypatch.setattr(fit, "_control_groups", lambda: [(1e9, 2e9)])
    assert fit.free_memory() == 0


def test_the_smallest_of_all_ranks_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks on GPUs, the second of which has less free memory."""
    found = [fit.Fit(9, 90, 100), fit.Fit(4, 40, 50), fit.Fit(9, 91, 100)]

    def gathered(into: list[Any], _: Any) -> None:
        into[:] = found if isinstance(_, tuple) else [None] * 3

    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(distributed.dist, "all_gather_object", gathered)
    monkeypatch.setattr(fit, "fit_micro_batch", lambda *_, **__: found[0])
    recipe = load(TrainRecipe, "sharebert-small", ["data.global_batch=27"], defaults=PLAN_DEFAULTS)
    training = recipe.resolve(3, needs_data=False)
    world = distributed.World(rank=0, world_size=3, local_rank=0, device=torch.device("cuda", 0))
    settled, training = fit.settle_micro_batch(recipe, training, world)
    assert settled.data.micro_batch == 4
    assert (training.micro_batches, training.micro_rows) == (3, 3), "9 rows in the fewest equal parts of at most 4"
    assert training.picked.startswith("data.micro_batch: auto picked 4, the most rows that fit (")


def test_the_trial_is_no_rank_and_sees_its_own_gpu() -> None:
    rank = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "TORCHELASTIC_RUN_ID": "b"}
    assert trial._alone(rank | {"PATH": "p"}, 1) == {"PATH": "p", "CUDA_VISIBLE_DEVICES": "1"}
    assert trial._alone(rank | {"CUDA_VISIBLE_DEVICES": "4,6"}, 1) == {"CUDA_VISIBLE_DEVICES": "6"}
    assert trial._alone(rank | {"CUDA_VISIBLE_DEVICES": ""}, None) == {"CUDA_VISIBLE_DEVICES": ""}


def test_only_a_number_of_rows_or_auto_is_taken() -> None:
    keys = {"data": {"dataset": "d", "global_batch": 2, "micro_batch": "auto"}, "run": "r"}
    assert parse(TrainRecipe, keys, "test").data.micro_batch == "auto"
    for wrong in ("all", 0, -3, 2.5, "8"):
        keys["data"] = {"dataset": "d", "global_batch": 2, "micro_batch": wrong}
        with pytest.raises(BadInput, match=r"data\.micro_batch: .*give a number of rows above 0, or auto"):
            parse(TrainRecipe, keys, "test")
    given = load(TrainRecipe, None, ["run=r", "data={dataset: d, global_batch: 2, micro_batch: 2}"])
    assert load(TrainRecipe, None, ["run=r", "data.dataset=d", "data.global_batch=2", "data.micro_batch=2"]) == given
    auto = replace(given.data, micro_batch="auto", global_batch=11)
    assert micro_shape(auto, 3) == (1, 4)
    assert plain(auto)["micro_batch"] == "auto"


def test_a_plan_takes_the_largest_micro_batch_by_its_estimate() -> None:
    recipe = load(TrainRecipe, "sharebert-small", ["data.micro_batch=auto"], defaults=PLAN_DEFAULTS)
    training, room = recipe.resolve(1, needs_data=False), USABLE * GPUS["h100"].memory_bytes
    config = ShareBertConfig.from_dict(SIZES["sharebert-small"])
    most = largest_rows(config, shape_of(recipe, training, 1), room)
    one = make_plan(recipe, 1, "h100", Assumptions())
    assert one.micro_batches == -(-4000 // most) > 1
    assert one.rows == -(-4000 // one.micro_batches)
    assert one.memory[1].total <= room
    assert one.rows > 500
    whole_share = make_plan(recipe, 8, "h100", Assumptions())
    assert (whole_share.micro_batches, whole_share.rows) == (1, 500)
    with pytest.raises(BadInput, match=r"--measure: data\.micro_batch is auto"):
        plan(recipe, [1], ["h100"], Assumptions(), with_measure=True)


@pytest.mark.slow
def test_the_trial_finds_what_fits_on_this_machine() -> None:
    """The share of memory is set so that the planner's estimate is 24 rows; the trial comes near it."""
    keys = ["data.global_batch=500", "data.micro_batch=auto", "precision=fp32", "zero.stage=0"]
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    keys += [f"model.{key}={value}" for key, value in (sizes | {"vocab_size": 5000, "factor_size": 64}).items()]
    recipe = load(TrainRecipe, None, [*keys, "model.max_position_embeddings=128"], defaults=PLAN_DEFAULTS)
    training = recipe.resolve(1, needs_data=False)
    shape = replace(shape_of(recipe, training, 1, cuda=False), rows=24)
    wanted = memory(training.model.config, shape).total
    ranks = round(fit.CPU_SHARE * fit.free_memory() / wanted)
    found = fit.fit_micro_batch(recipe, most=500, sharing=ranks)
    assert found.memory_bytes <= found.limit_bytes == pytest.approx(wanted, rel=0.3)
    assert 12 <= found.rows <= 48


def test_a_model_of_which_not_one_row_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "in_fresh_process", lambda *_, **__: {"rows": 0, "memory_bytes": 9e9, "limit_bytes": 7e9})
    recipe = load(TrainRecipe, "sharebert-small", ["data.micro_batch=auto"], defaults=PLAN_DEFAULTS)
    with pytest.raises(BadInput, match=r"data\.micro_batch: auto: one row takes 9\.00 GB, .* 7\.00 GB; set recompute"):
        fit.fit_micro_batch(recipe, most=500)


@pytest.mark.slow
def test_a_run_picks_the_same_on_all_ranks_and_its_losses_are_those_of_a_number(dataset: Path, tmp_path: Path) -> None:
    by_number = {"overrides": train_arguments(dataset, tmp_path / "number", steps=6, data__micro_batch=2)}
    auto = train_arguments(dataset, tmp_path / "auto", steps=6, data__micro_batch="auto")
    said = train_many([by_number, {"overrides": auto, "stop_after": 3}], 2, tmp_path)
    assert "fp32, ZeRO 1; data.micro_batch: auto picked 5: the whole share of a rank fits (" in said
    config = (tmp_path / "auto" / "config.yaml").read_text()
    assert config.startswith("# data.micro_batch: auto picked 5")
    assert "micro_batch: 5\n" in config
    assert load(TrainRecipe, str(tmp_path / "auto" / "config.yaml")).data.micro_batch == 5
    command = [sys.executable, "-m", "pretrain", str(tmp_path / "auto" / "config.yaml")]
    command += ["data.micro_batch=auto"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert ", ZeRO 1; data.micro_batch: auto picked 10" in done.stderr, "another number of ranks, another share"
    assert "the recipe changed: data.micro_batch was 5, is now 10" in done.stderr
    assert len(losses(tmp_path / "auto")) == 6
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "number"), rel=2e-6)
