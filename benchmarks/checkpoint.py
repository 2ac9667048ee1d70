"""The time that a save costs a training: this project's save in the background, and DeepSpeed's own save with fsync.

The state is that of sharebert-base (30,522 words, untied head) in the real engine, at ZeRO 1 on two ranks of this
machine. A real step of this model takes seconds on a CPU, and real steps vary by more than a save adds to twenty of
them. So the benchmark replaces a step by its parts: a matrix product that keeps a rank's core busy for a fifth to a
third of a second, and an all-reduce for which the ranks wait. Each round measures, one after another:

    20 steps                                       the plain time
    a save, and the 20 steps after it              the cost is the time beyond the plain time: the copy of the
                                                   state, and the slower steps while the file is written
    DeepSpeed's save_checkpoint, files fsynced     the cost is all of its time, because training waits

Checkpoints are deleted between rounds. The benchmark prints the medians over the rounds and their ratio, which must be
at most 15 %. Short steps make this hard: the save must be written within 20 of them, and what is not written by then
counts as part of the cost. The machine must be quiet and have a core for each rank.

    python -m benchmarks.checkpoint [--rounds 9] [--precision fp32|bf16] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

STEPS_AFTER = 20
ROW_TOKENS = 16
PRODUCT = 2048
"""The product of two 2048 x 2048 matrices takes one core a fifth to a third of a second."""
BAR = 0.15


def worker(rounds: int, precision: Any, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from pretrain import distributed
    from pretrain.checkpoint.rng_state import rng_state
    from pretrain.checkpoint.writer import CheckpointRecipe, CheckpointWriter
    from pretrain.engine.config import ZeroRecipe, deepspeed_config
    from pretrain.engine.engine import open_engine
    from pretrain.engine.optimizer import OptimizerRecipe
    from pretrain.model import ModelRecipe, build_model, choose_model

    world = distributed.join(600)
    torch.set_num_threads(1)
    choice = choose_model(ModelRecipe(size="sharebert-base"), 30_522, ROW_TOKENS)
    model = build_model(choice, seed=0)
    parameters = sum(p.numel() for p in model.parameters())
    config = deepspeed_config(
        zero=ZeroRecipe(stage=1), precision=precision, clip=0.5, micro_batch=1, micro_batches=1, parameters=parameters
    )
    engine = open_engine(model, config, OptimizerRecipe())
    engine.learning_rate = 1e-4
    tokens = torch.randint(5, 30_522, (1, ROW_TOKENS), generator=torch.Generator().manual_seed(world.rank))
    positions = torch.tensor([3, 7])
    writer = CheckpointWriter(folder / "ours", CheckpointRecipe(keep=2), world.rank, world.world_size, print)
    writer.open("benchmark")

    def real_step() -> None:
        output = engine(tokens, positions=positions, labels=tokens[0, positions], loss_weights=torch.ones(2))
        engine.backward(output.loss_sum)
        engine.step()

    a, b = torch.randn(2, PRODUCT, PRODUCT).unbind()
    out, reduced = torch.empty_like(a), torch.ones(1)

    def steps() -> None:
        for _ in range(STEPS_AFTER):
            torch.mm(a, b, out=out)
            dist.all_reduce(reduced)

    def save_and_steps(number: int) -> None:
        started = time.perf_counter()
        writer.save(number, engine.fragments(world), engine.shapes(), rng_state(), {})
        copied.append(time.perf_counter() - started)
        steps()
        stepped = time.perf_counter()
        writer.finish()
        left.append(time.perf_counter() - stepped)

    def save_deepspeed() -> None:
        engine._deepspeed.save_checkpoint(str(folder / "deepspeed"), tag="benchmark")
        dist.barrier()
        files = sorted(file for file in (folder / "deepspeed").rglob("*") if file.is_file())
        for file in files[world.rank :: world.world_size]:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())

    def seconds(work: Callable[[], None]) -> float:
        dist.barrier()
        started = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - started

    for _ in range(2):
        real_step()
    writer.allocate(engine.fragments(world), rng_state())  # as training does before its first step
    plain, ours, theirs = [], [], []
    copied: list[float] = []
    left: list[float] = []
    for number in range(1, rounds + 1):
        plain.append(seconds(steps))
        ours.append(seconds(partial(save_and_steps, number)))
        theirs.append(seconds(save_deepspeed))
        if world.is_main:
            size = sum(file.stat().st_size for file in (folder / "ours").rglob("*.safetensors"))
            for written in [folder / "deepspeed", *(folder / "ours").glob("step-*")]:
                shutil.rmtree(written)
            os.sync()  # the file system frees the blocks now, not in the next round
            took = f"{plain[-1]:.1f} s, with our save {ours[-1]:.1f} s; DeepSpeed's save {theirs[-1]:.1f} s"
            print(f"  round {number}: {STEPS_AFTER} steps {took}", flush=True)
    plain.append(seconds(steps))
    if world.is_main:
        around = [(before + after) / 2 for before, after in pairwise(plain)]
        extra = median(mine - base for mine, base in zip(ours, around, strict=True))
        print(f"sharebert-base, {parameters:,} parameters, {precision}, ZeRO 1, 2 ranks; {size / 1e6:,.0f} MB of state")
        print(f"  a step                                          {median(plain) / STEPS_AFTER:8.3f} s")
        print(f"  DeepSpeed's save with fsync                     {median(theirs):8.3f} s")
        print(f"  ours: beyond the plain time of {STEPS_AFTER} steps         {extra:8.3f} s")
        print(f"  ours: of that, copying the state                {median(copied):8.3f} s")
        print(f"  ours: of that, left to write after these steps  {median(left):8.3f} s")
        print(f"  ratio {extra / median(theirs):.1%} (bar {BAR:.0%})")
    distributed.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--folder", type=Path, help="folder to write into; default: a temporary one")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.rounds, given.precision, given.folder)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        keys = [
            "-m",
            "benchmarks.checkpoint",
            "--worker",
            f"--rounds={given.rounds}",
            f"--precision={given.precision}",
            f"--folder={folder}",
        ]
        subprocess.run([*start, *keys], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
