"""Run under torchrun: trains several recipes one after another in the same processes.

A start of DeepSpeed costs seconds; the tests share it. The argument is a JSON file with a list of runs:

    {"overrides": [...]}                          train
    {"overrides": [...], "copy": [RUN, STEP]}     train on from a copy of another run, cut off after STEP
    {"overrides": [...], "save_again": true}      load the newest checkpoint and save it under RUN/again at once
    {"overrides": [...], "no_masters": true}      train in bf16 without fp32 masters, at stage 0

Beside it, rank 0 writes one entry a run: its exit code, or its error.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pretrain import distributed
from pretrain import train as training
from pretrain.distributed import World
from pretrain.run_folder import RunFolder
from pretrain.stop import StopRequest
from sharebert_recipe import load

build_model, deepspeed_config = training.build_model, training.deepspeed_config


def leave_out_masters(yes: bool) -> None:
    """Give the engine bf16 weights as if they were fp32 ones: Adam then steps the working weights themselves."""
    training.build_model = (lambda choice, seed: build_model(choice, seed).bfloat16()) if yes else build_model
    training.deepspeed_config = (
        (lambda **given: deepspeed_config(**given | {"precision": "fp32"})) if yes else deepspeed_config
    )


def copy_run(source: Path, target: Path, step: int) -> None:
    shutil.copytree(source, target)
    for folder in (target / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def save_again(recipe: training.TrainRecipe, world: World) -> int:
    """Load and save without a step between: what comes out is what the engine holds. Facts for the test as well."""
    run = RunFolder(recipe.run)
    accepted = training._accept(recipe, run, world)
    trainer = training.Trainer(recipe, run, world, StopRequest(None), *accepted)
    if recipe.zero["stage"] == 3:
        named = dict(trainer.engine.module.named_parameters())
        for name in ("sharebert.word_embeddings.weight", "sharebert.factor_linear_all.weight"):
            local, full = named[name].numel(), named[name].ds_numel
            assert local == 0, f"{name}: {local} of {full} elements lie whole on this rank"
    trainer.saver.files.checkpoints = run.path / "again"
    trainer.saver.files.checkpoints.mkdir(exist_ok=True)
    trainer.saver.save(trainer.first_step)
    trainer.saver.finish()
    run.release()
    return 0


def main() -> None:
    plan = Path(sys.argv[1])
    world = distributed.join(timeout_s=120)
    results: list[dict[str, Any]] = []
    for run in json.loads(plan.read_text()):
        recipe = load(training.TrainRecipe, None, run["overrides"])
        if "copy" in run and world.is_main:
            copy_run(Path(run["copy"][0]), Path(recipe.run), run["copy"][1])
        dist.barrier()
        leave_out_masters(run.get("no_masters", False))
        try:
            results.append({"code": (save_again if run.get("save_again") else training.train)(recipe, world)})
        except Exception:
            results.append({"error": traceback.format_exc()})
    if world.is_main:
        plan.with_suffix(".results.json").write_text(json.dumps(results))
    distributed.leave()


if __name__ == "__main__":
    main()
