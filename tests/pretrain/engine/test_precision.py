"""A real run in bf16 ends where the same run in fp32 does; the logic of fp16's loss scale, which no CPU runs."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import losses, train_arguments, train_many

from pretrain.engine.config import ZeroRecipe, deepspeed_config
from pretrain.engine.deepspeed_import import import_deepspeed
from pretrain.engine.engine import Engine
from pretrain.engine.loss_scaler import load_scaler_state, loss_scale, scaler_state

BAR = 0.02
"""Nats between the means of the last 50 of 300 steps."""


@pytest.mark.slow
def test_bf16_ends_within_a_fiftieth_of_a_nat_of_fp32(dataset: Path, tmp_path: Path) -> None:
    """With the authors' dropout and untied head, at the stage that is the default."""
    plan = [
        {
            "overrides": train_arguments(
                dataset,
                tmp_path / precision,
                steps=300,
                precision=precision,
                data__global_batch=32,
                data__micro_batch=32,
                model__hidden_dropout_prob=0.1,
                model__attention_probs_dropout_prob=0.1,
                model__mlm_head="untied",
            )
        }
        for precision in ("fp32", "bf16")
    ]
    train_many(plan, 1, tmp_path)
    full, half = (losses(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert len(full) == len(half) == 300
    ends = mean(full[-50:]), mean(half[-50:])
    print(f"last 50 of 300 steps: fp32 {ends[0]:.4f}, bf16 {ends[1]:.4f}")
    assert ends[0] < mean(full[:10]) - 1.0, "it did not learn, so equal losses say nothing"
    assert abs(ends[0] - ends[1]) <= BAR


def fp16_engine(stage: int) -> Any:
    """What stands in for an engine: the scaler that DeepSpeed makes from our config."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    keys = deepspeed_config(
        zero=ZeroRecipe(stage=stage), precision="fp16", clip=0.5, micro_batch=4, micro_batches=1, parameters=1000
    )
    fp16 = DeepSpeedConfig(keys).float16_config
    scaler = CreateLossScaler(torch.half, fp16.loss_scale, fp16.loss_scale == 0, fp16.dynamic_loss_scale_args())
    optimizer = SimpleNamespace(loss_scaler=scaler)
    return SimpleNamespace(optimizer=optimizer, torch_autocast_z0_gradscaler=None)


def scale_after(engine: Any, *overflows: bool) -> float:
    """The loss scale after steps of which some were not finite."""
    for overflow in overflows:
        engine.optimizer.loss_scaler.update_scale(overflow)
    engine.optimizer.cur_scale = engine.optimizer.loss_scaler.cur_scale
    return loss_scale(engine)


@pytest.fixture
def no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler asks for the rank before it says something."""
    import_deepspeed()
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda group=None: 1)


@pytest.mark.usefixtures("no_process_group")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16s_scale_falls_on_overflow_and_rises_after_a_thousand_good_steps(stage: int) -> None:
    engine = fp16_engine(stage)
    assert scale_after(engine) == 2**16
    assert scale_after(engine, True) == 2**16, "one overflow is forgiven"
    assert scale_after(engine, True) == 2**15
    assert scale_after(engine, *[False] * 1000) == 2**15
    assert scale_after(engine, False) == 2**16
    assert Engine(engine, clip=0.5).loss_scale_can_fall


@pytest.mark.usefixtures("no_process_group")
def test_fp16s_scaler_goes_on_where_it_was() -> None:
    engine, resumed = fp16_engine(1), fp16_engine(1)
    scale_after(engine, True, True, True, *[False] * 600)
    load_scaler_state(resumed, scaler_state(engine))
    rest = (*[False] * 401, True, False)
    assert scale_after(resumed, *rest) == scale_after(engine, *rest)
    assert scaler_state(resumed) == scaler_state(engine)
