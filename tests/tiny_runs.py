"""Runs of a tiny model, launched as users launch them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pretrain.checkpoint import format as checkpoint
from pretrain.checkpoint.format import Checkpoint
from pretrain.checkpoint.writer import CheckpointRecipe, CheckpointWriter
from sharebert_common.run_files import read_log

MANY_RUNS = Path(__file__).parent / "pretrain" / "many_runs.py"

MASKS = {
    "data__mask_rate": 0.4,
    "data__mask_schedule__last_rate": 0.15,
    "data__mask_schedule__masked": 1.0,
    "data__mask_schedule__last_masked": 0.6,
    "data__mask_schedule__random": 0.0,
    "data__mask_schedule__last_random": 0.2,
    "data__mask_schedule__shape": "cosine",
}
"""A mask schedule: rate and shares change over the steps."""


def torchrun(world_size: int, *arguments: str, restarts: int = 0) -> list[str]:
    """The command that starts `ranks` workers on this machine, and starts them again when one dies."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    return [*start, f"--max-restarts={restarts}", *arguments]


def train_many(plan: Sequence[dict[str, Any]], world_size: int, folder: Path) -> str:
    """Run `many_runs.py` on `ranks` processes; what it said.

    Fails the test where a run of the plan failed, or one with `error` did not fail in saying so.
    """
    file = folder / f"plan-{world_size}.json"
    file.write_text(json.dumps(plan))
    done = subprocess.run(
        torchrun(world_size, str(MANY_RUNS), str(file)),
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for run, result in zip(plan, json.loads(file.with_suffix(".results.json").read_text()), strict=True):
        if "error" in run:
            assert run["error"] in result.get("error", ""), result
        else:
            assert "error" not in result, f"{run['overrides']}\n{result['error']}"
    return done.stderr


def train_arguments(dataset: Path, run: Path, **overrides: Any) -> list[str]:
    """`key=value` of a run of a tiny model in fp32, without dropout; `a__b=1` overrides `a.b`."""
    keys: dict[str, Any] = {
        "run": run,
        "data.dataset": dataset,
        "data.global_batch": 10,
        "data.micro_batch": 10,
        "steps": 20,
        "precision": "fp32",
        "zero.stage": 1,
        "optimizer.lr": 3e-3,
        "model.hidden_size": 32,
        "model.intermediate_size": 48,
        "model.num_hidden_layers": 2,
        "model.num_attention_heads": 4,
        "model.factor_size": 8,
        "model.mlm_head": "tied",
        "model.hidden_dropout_prob": 0.0,
        "model.attention_probs_dropout_prob": 0.0,
        "monitor.every": 1,
        "validate.every": 0,
    }
    keys |= {key.replace("__", "."): value for key, value in overrides.items()}
    return [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in keys.items()]


def log_of(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's log."""
    return read_log(run)


def losses(run: Path) -> list[float]:
    """The loss of each logged step."""
    return [line["loss"] for line in log_of(run) if "loss" in line]


def whole(run: Path, step: int, folder: str = "checkpoints") -> Checkpoint:
    """A run's checkpoint of a step, with its checksums compared."""
    found = checkpoint.read_manifest(run / folder / checkpoint.folder_name(step))
    checkpoint.verify(found)
    return found


def open_writer(
    folder: Path,
    rank: int,
    world_size: int,
    report: Callable[[str], None],
    *,
    token: str = "token",
    recipe: CheckpointRecipe | None = None,
) -> CheckpointWriter:
    """A rank's writer of checkpoints, ready to save."""
    writer = CheckpointWriter(folder, recipe or CheckpointRecipe(), rank, world_size, report)
    writer.open(token)
    return writer
