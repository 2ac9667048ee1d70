"""A few optimizer steps of a recipe on this machine, in a fresh process: its memory and its speed.

The rows are random words, so no dataset has to exist. One process trains, with the micro-batches of the planned run.
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sharebert_common.errors import BadInput
from sharebert_common.recipe import load, to_yaml

if TYPE_CHECKING:
    from pretrain.data.batches import MicroBatch
    from pretrain.recipe import ResolvedTraining, TrainRecipe

STEPS = 2
"""Optimizer steps that are measured, after one that is not."""


class Measured(NamedTuple):
    """What the steps took."""

    device: str
    """Name of the device."""
    base_bytes: int
    """Memory of the process before the model is built: Python and libraries. 0 on a GPU."""
    memory_bytes: int
    """Highest memory of the steps above `base_bytes`."""
    step_s: float
    """Seconds of an optimizer step."""
    tokens_per_s: float
    """Tokens of those steps in a second."""
    micro_batches: int
    """Micro-batches in each of these steps."""


def measure(recipe: TrainRecipe, *, micro_batches: int, micro_rows: int) -> Measured:
    """Run steps of `recipe` in a fresh process of its own, with micro-batches of `micro_rows` rows.

    Raises BadInput where the steps do not run here, with the last line of the process.
    """
    given = {"recipe": to_yaml(recipe), "micro_batches": micro_batches, "micro_rows": micro_rows}
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.plan.measure"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}: killed, perhaps for memory"])[-1]
        raise BadInput(f"--measure: the steps failed: {last}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _steps(recipe: TrainRecipe, training: ResolvedTraining, micro_batches: int, micro_rows: int) -> Measured:
    """Train in this process. It must be fresh: memory of earlier work would count."""
    import torch

    from pretrain import distributed
    from pretrain.engine.config import deepspeed_config
    from pretrain.engine.deepspeed_import import import_deepspeed
    from pretrain.engine.engine import open_engine
    from pretrain.model import build_model, compile_layers
    from pretrain.objective import MaskedLanguageModelling

    world = distributed.join(recipe.collective_timeout_s)
    cuda = world.device.type == "cuda"
    import_deepspeed()
    torch.nn.Linear(64, 64)(torch.zeros(64, 64)).sum().backward()  # threads and libraries that load at the first use
    micro = _random_rows(training, recipe.data.highest_mask_rate, micro_rows)
    base = 0 if cuda else _reset_peak()
    model = build_model(training.model, recipe.seed)
    model.sharebert.recompute = recipe.recompute
    if recipe.compile:
        compile_layers(model)
    parameters = sum(p.numel() for p in model.parameters())
    config = deepspeed_config(
        zero=recipe.zero,
        precision=recipe.precision,
        clip=recipe.optimizer.clip,
        micro_batch=micro_rows,
        micro_batches=micro_batches,
        parameters=parameters,
    )
    engine = open_engine(model, config, recipe.optimizer)
    del model
    objective = MaskedLanguageModelling(world.device, within_documents=recipe.data.within_documents)
    engine.train()
    masked = float(micro.loss_weights.sum()) * micro_batches
    times = []
    for _ in range(1 + STEPS):
        started = time.perf_counter()
        for _ in range(micro_batches):
            losses = objective(engine, micro)
            engine.backward(losses.loss / masked)
            engine.step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    step_s = sum(times[1:]) / STEPS
    return Measured(
        device=torch.cuda.get_device_name() if cuda else "cpu",
        base_bytes=base,
        memory_bytes=torch.cuda.max_memory_allocated() if cuda else _peak() - base,
        step_s=step_s,
        tokens_per_s=micro_batches * micro_rows * training.seq_len / step_s,
        micro_batches=micro_batches,
    )


def _random_rows(training: ResolvedTraining, mask_rate: float, rows: int) -> MicroBatch:
    """A micro-batch of random words, without padding."""
    import torch

    from pretrain.data.batches import MicroBatch

    seq_len, words = training.seq_len, training.model.config.vocab_size
    capacity = max(1, round(mask_rate * seq_len))
    columns = torch.rand(rows, seq_len).argsort(1)[:, :capacity]
    return MicroBatch(
        torch.randint(words, (rows, seq_len), dtype=torch.int32),
        torch.ones(rows, seq_len, dtype=torch.uint8),
        (columns + seq_len * torch.arange(rows)[:, None]).flatten(),
        torch.randint(words, (rows * capacity,)),
        torch.ones(rows * capacity),
        padded=False,
    )


def _reset_peak() -> int:
    """Let the highest memory of this process begin at what it holds now. Returns that, in bytes."""
    with contextlib.suppress(OSError):  # not Linux, or a kernel without it: the peak so far is lower than the steps'
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Highest resident memory of this process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    import tempfile

    from pretrain.recipe import TrainRecipe
    from sharebert_common.quiet import quiet_libraries

    quiet_libraries()
    given = json.load(sys.stdin)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(given["recipe"])
        file.flush()
        recipe = load(TrainRecipe, file.name)
    resolved = recipe.resolve(1, needs_data=False)
    print(json.dumps(_steps(recipe, resolved, given["micro_batches"], given["micro_rows"])._asdict()))
