"""A real run in bf16 ends where the same run in fp32 does."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
from tiny_runs import losses, train_arguments, train_many

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
