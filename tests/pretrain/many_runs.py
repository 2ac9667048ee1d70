"""Run under torchrun: trains several recipes one after another in the same processes.

A start of DeepSpeed costs seconds; the tests share it. The argument is a JSON file with a list of runs:

    {"overrides": [...]}                          train
    {"overrides": [...], "copy": [RUN, STEP]}     train on from a copy of another run, cut off after STEP
    {"overrides": [...], "save_again": true}      load the newest checkpoint and save it under RUN/again at once
    {"overrides": [...], "no_masters": true}      train in bf16 without fp32 masters, at stage 0
    {"overrides": [...], "stop_after": N}         the last rank gets a signal in the Nth step of the launch
    {"overrides": [...], "bad_rows": [A, B]}      the loss of positions A to B - 1 is not a number, on the last rank
    {"overrides": [...], "bad_steps": [A, B]}     so is that of steps A to B - 1
    {"overrides": [...], "slow_s": S}             a forward pass of the last rank takes S seconds longer

Beside it, rank 0 writes one entry a run: its exit code, or its error.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain import distributed
from pretrain import train as training
from pretrain.data.batches import MicroBatch
from pretrain.distributed import World
from pretrain.faults.stop import StopRequest
from pretrain.objective import LossSums
from pretrain.recipe import TrainRecipe
from pretrain.run.folder import RunFolder
from sharebert_common.recipe import load

build_model, deepspeed_config = training.build_model, training.deepspeed_config


def leave_out_masters(yes: bool) -> None:
    """Give the engine bf16 weights as if they were fp32 ones: Adam then steps the working weights themselves."""
    training.build_model = (lambda *given: build_model(*given).bfloat16()) if yes else build_model
    training.deepspeed_config = (
        (lambda **given: deepspeed_config(**given | {"precision": "fp32"})) if yes else deepspeed_config
    )


class StopAfter(StopRequest):
    """Has got a signal from the `steps`-th look on; a training looks once a step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    @property
    def asked(self) -> bool:
        self.left -= 1
        if self.left <= 0:
            self._signals.received = signal.SIGTERM
        return super().asked


class FaultyTrainer(training.Trainer):
    """Has what a plan says go wrong on the last rank."""

    plan: dict[str, Any]

    def step(self, step: int, batch: training.StepBatch) -> bool:
        first, end = self.plan.get("bad_rows", [0, 0])
        bad = first < batch.rows_consumed and batch.rows_consumed - self.recipe.data.global_batch < end
        first, end = self.plan.get("bad_steps", [0, 0])
        self.bad = (bad or first <= step < end) and self.world.rank == self.world.world_size - 1
        return super().step(step, batch)

    def __enter__(self) -> training.Trainer:
        self.bad, healthy = False, self.objective

        def faulty(model: Any, batch: MicroBatch) -> LossSums:
            losses = healthy(model, batch)
            if self.world.rank == self.world.world_size - 1:
                time.sleep(self.plan.get("slow_s", 0))
            return losses._replace(loss=losses.loss * math.nan) if self.bad else losses

        self.objective = faulty
        return super().__enter__()


Trainer = training.Trainer


def train(recipe: TrainRecipe, world: World, run: dict[str, Any]) -> int:
    faulty = any(key in run for key in ("bad_rows", "bad_steps", "slow_s"))
    training.Trainer = type("Faulty", (FaultyTrainer,), {"plan": run}) if faulty else Trainer
    stop = StopAfter(run["stop_after"]) if "stop_after" in run and world.rank == world.world_size - 1 else StopRequest()
    return training.train(recipe, world, stop)


def copy_run(source: Path, target: Path, step: int) -> None:
    shutil.copytree(source, target)
    for folder in (target / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def save_again(recipe: TrainRecipe, world: World) -> None:
    """Load and save without a step between: what comes out is what the engine holds. Facts for the test as well."""
    run = RunFolder(recipe.run)
    accepted = training.accept(recipe, run, world)
    with training.Trainer(recipe, run, world, StopRequest(), accepted) as trainer:
        if recipe.zero.stage == 3 and world.world_size > 1:  # a rank alone holds all of everything
            named = dict(trainer.engine.module.named_parameters())
            for name in ("sharebert.word_embeddings.weight", "sharebert.factor_linear_all.weight"):
                local, full = named[name].numel(), named[name].ds_numel
                assert local == 0, f"{name}: {local} of {full} elements lie whole on this rank"
        trainer.state.files.checkpoints = run.path / "again"
        trainer.state.files.checkpoints.mkdir(exist_ok=True)
        trainer.state.save(trainer.first_step)
        trainer.state.finish()
    run.release()


def main() -> None:
    plan = Path(sys.argv[1])
    world = distributed.join(timeout_s=120)
    results: list[dict[str, Any]] = []
    for run in json.loads(plan.read_text()):
        recipe = load(TrainRecipe, None, run["overrides"])
        if "copy" in run and world.is_main:
            copy_run(Path(run["copy"][0]), Path(recipe.run), run["copy"][1])
        dist.barrier()
        leave_out_masters(run.get("no_masters", False))
        try:
            if run.get("save_again"):
                save_again(recipe, world)
                results.append({"code": 0})
            else:
                results.append({"code": train(recipe, world, run)})
        except Exception:
            results.append({"error": traceback.format_exc()})
    if world.is_main:
        plan.with_suffix(".results.json").write_text(json.dumps(results))
    distributed.leave()
    distributed.exit_now(0)


if __name__ == "__main__":
    main()
