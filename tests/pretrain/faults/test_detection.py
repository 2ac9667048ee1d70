"""What is done about faults, by itself: the spike detector, slow ranks, rows given up."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint.format import Checkpoint
from pretrain.distributed import World
from pretrain.engine.deepspeed_import import import_deepspeed
from pretrain.engine.loss_scaler import load_scaler_state, scaler_state
from pretrain.faults.detection import SlowRanks, SpikeDetector
from pretrain.faults.recipe import FaultsRecipe
from pretrain.faults.skipping import BadRows, BadRowsFile, SkippedSteps, TooManyFaults
from sharebert_common.errors import BadInput

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def alone() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield ALONE
    dist.destroy_process_group()


def test_a_spike_is_reported_and_noise_is_not() -> None:
    said: list[str] = []
    spikes = SpikeDetector(6.0, said.append)
    noise = random.Random(0)
    for step in range(1, 1001):
        spikes.look(step, 8 - step / 200 + noise.gauss(0, 0.1))  # falls, as losses do
    assert said == []
    above = spikes.look(1001, 5.0)
    assert above is not None
    assert above > 6
    assert len(said) == 1
    assert said[0].startswith("step 1001: loss 5.0000 is ")


def test_no_spike_is_reported_before_enough_is_known() -> None:
    spikes = SpikeDetector(6.0, pytest.fail)
    assert [spikes.look(step, loss) for step, loss in enumerate((8.0, 8.0, 800.0))] == [None] * 3


def test_a_rank_is_named_once_it_is_slow_for_some_lines() -> None:
    said: list[str] = []
    slow = SlowRanks(1.5, ["a", "b", "c"], said.append)
    assert slow.look(1, [1.0, 1.0, 1.4]) == pytest.approx(1.4)
    for step in (2, 3):
        assert slow.look(step, [1.0, 1.1, 2.2]) == pytest.approx(2.0)
    slow.look(4, [3.0, 1.0, 1.0])
    for step in range(5, 10):
        slow.look(step, [1.0, 1.0, 3.0])
    assert said == [
        "step 7: rank 2 on c is slow: rows and forward passes take it 3.0 times the median of all ranks, "
        "which wait for it"
    ]
    assert SlowRanks(1.5, ["a"], pytest.fail).look(1, [5.0]) is None


def test_of_two_ranks_the_slow_one_is_named() -> None:
    said: list[str] = []
    slow = SlowRanks(1.5, ["a", "b"], said.append)
    for step in range(3):
        slow.look(step, [0.1, 1.0])
    assert len(said) == 1
    assert "rank 1 on b" in said[0]


def test_bad_rows_are_kept_for_the_next_attempt(alone: World, tmp_path: Path) -> None:
    file = tmp_path / "bad_rows.jsonl"
    rows = BadRowsFile(file, alone, pytest.fail)
    rows.add(BadRows(20, 30, step=3, back_to=0))
    rows.add(BadRows(29, 45, step=4, back_to=0))
    again = BadRowsFile(file, alone, pytest.fail)
    again.read()
    assert again.entries == rows.entries
    assert (again.returns_to(0), again.returns_to(5)) == (2, 0)
    file.write_text("rows\n")
    with pytest.raises(BadInput, match="not a list of rows to skip"):
        BadRowsFile(file, alone, pytest.fail).read()


def test_more_rows_are_given_up_each_time(alone: World, tmp_path: Path) -> None:
    said: list[str] = []
    rows = BadRowsFile(tmp_path / "bad_rows.jsonl", alone, said.append)
    skips = SkippedSteps(FaultsRecipe(max_skipped=2, max_returns=2), rows, said.append)
    found = Checkpoint(tmp_path, {"step": 5, "training": {"loader": {"rows_consumed": 50}}})
    for end in (90, 120):
        for step, first in ((8, end - 20), (9, end - 10)):
            assert not skips.too_many
            skips.count(step, range(first, first + 10), skipped=True)
        assert skips.too_many
        skips.give_up_rows(9, found)
        assert not skips.too_many
    assert rows.entries == [BadRows(70, 90, 9, 5), BadRows(50, 120, 9, 5)]
    skips.count(10, range(120, 130), skipped=True)
    skips.count(11, range(130, 140), skipped=False)
    assert skips.in_a_row == 0
    with pytest.raises(TooManyFaults, match="returning to step 5 2 times did not help"):
        skips.give_up_rows(13, found)


def engine_with(scaler: Any) -> Any:
    return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))


def test_the_state_of_the_loss_scaler_goes_along_and_nowhere_else() -> None:
    """fp16's dynamic scale is saved and loaded; a run that goes on in bf16 leaves it aside, and the other way round."""
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    def dynamic() -> Any:
        return engine_with(DynamicLossScaler(2.0**16, 1000, 1.0, 2, False))

    fp16, bf16 = dynamic(), engine_with(LossScaler(scale=1.0))
    vars(fp16.optimizer.loss_scaler).update(cur_scale=2.0**9, cur_iter=7, last_overflow_iter=5, cur_hysteresis=1)
    state = scaler_state(fp16)
    fresh = dynamic()
    load_scaler_state(fresh, state)
    assert vars(fresh.optimizer.loss_scaler) == vars(fp16.optimizer.loss_scaler)
    load_scaler_state(bf16, state)
    assert bf16.optimizer.loss_scaler.cur_scale == 1.0
    load_scaler_state(fresh, scaler_state(bf16))
    assert fresh.optimizer.loss_scaler.cur_scale == state["cur_scale"]
