"""Trial steps of a recipe on random rows, in a fresh process: its memory is that of the steps alone.

No dataset has to exist. One process trains, with the engine's settings of the recipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharebert_common.errors import BadInput
from sharebert_common.processes import STOP_SIGNALS, peak_memory_bytes, signal_on_parent_death
from sharebert_common.recipe import load, to_yaml

if TYPE_CHECKING:
    from pretrain.data.batches import MicroBatch
    from pretrain.recipe import ResolvedTraining, TrainRecipe

GROUP_PREFIXES = ("TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_", "ROLE_")
"""Environment variables that tell a process that it is a rank; the trial is none."""


def in_fresh_process(
    module: str, recipe: TrainRecipe, *, about: str, device: int | None = None, **given: Any
) -> dict[str, Any]:
    """The JSON object that `python -m module` prints last. It reads the recipe and `given` from its standard input.

    Args:
        module: calls `read_given` and prints a JSON object.
        recipe: what is tried.
        about: the key or option that an error names.
        device: number of the one GPU that it uses, among those that this process sees; None leaves all.
        given: further JSON values.

    Raises BadInput where the process fails, with its last line.
    """
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(given | {"recipe": to_yaml(recipe)}),
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=_alone(os.environ, device),
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}: killed, perhaps for memory"])[-1]
        raise BadInput(f"{about}: the steps failed: {last}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _alone(environment: Mapping[str, str], device: int | None) -> dict[str, str]:
    """The environment of a process that is no rank and sees one GPU."""
    ours = {
        key: value
        for key, value in environment.items()
        if key not in ("RANK", "WORLD_SIZE") and not key.startswith(GROUP_PREFIXES)
    }
    if device is None:
        return ours
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return ours | {"CUDA_VISIBLE_DEVICES": visible[device] if device < len(visible) else str(device)}


def read_given() -> tuple[TrainRecipe, dict[str, Any]]:
    """In the fresh process: the recipe, and the other values.

    Signals that ask a run to stop are not for it, and it dies with the process that started it: it would hold memory
    of which the next attempt then finds less.
    """
    import tempfile

    from pretrain.recipe import TrainRecipe
    from sharebert_common.quiet import quiet_libraries

    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal_on_parent_death(signal.SIGKILL)
    quiet_libraries()
    given = json.load(sys.stdin)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(given.pop("recipe"))
        file.flush()
        return load(TrainRecipe, file.name), given


class Trial:
    """The engine of a recipe in this process, which must be fresh: memory of earlier work would count."""

    def __init__(self, recipe: TrainRecipe, micro_batches: int) -> None:
        """Build it; `micro_batches` are those of an optimizer step."""
        import torch

        from pretrain import distributed
        from pretrain.engine.config import deepspeed_config, refuse_fp16_without_cuda
        from pretrain.engine.deepspeed_import import import_deepspeed
        from pretrain.engine.engine import open_engine
        from pretrain.engine.numerics import set_numerics
        from pretrain.model import build_model, compile_layers
        from pretrain.objective import MaskedLanguageModelling

        self.training: ResolvedTraining = recipe.resolve(1, needs_data=False)
        self.micro_batches, self._mask_rate = micro_batches, recipe.data.highest_mask_rate
        self.world = distributed.join(recipe.collective_timeout_s)
        self.cuda = self.world.device.type == "cuda"
        refuse_fp16_without_cuda(recipe.precision, self.world.device)
        import_deepspeed()
        set_numerics(self.training.model.config.attention_probs_dropout_prob, deterministic=recipe.deterministic)
        # Threads and libraries that load at the first use.
        with self.world.device:
            torch.nn.Linear(64, 64)(torch.zeros(64, 64)).sum().backward()
        self.base_bytes = 0 if self.cuda else _reset_peak()
        """Memory of the process before the model is built: Python and libraries. 0 on a GPU."""
        model = build_model(self.training.model, recipe.seed, recipe.quantise)
        model.sharebert.recompute = recipe.recompute
        if recipe.compile:
            compile_layers(model)
        config = deepspeed_config(
            zero=recipe.zero,
            precision=recipe.precision,
            clip=recipe.optimizer.clip,
            micro_batch=1,  # the engine does not look at it
            micro_batches=micro_batches,
            parameters=sum(p.numel() for p in model.parameters()),
        )
        self._engine = open_engine(model, config, recipe.optimizer)
        self._objective = MaskedLanguageModelling(
            self.world.device, within_documents=recipe.data.within_documents, one_graph=recipe.compile
        )
        self._engine.train()

    def steps(self, rows: int, count: int = 1) -> list[float]:
        """Make optimizer steps with micro-batches of `rows` rows; the seconds of each."""
        import torch

        micro = random_rows(self.training, self._mask_rate, rows)
        masked = float(micro.loss_weights.sum()) * self.micro_batches
        times = []
        for _ in range(count):
            started = time.perf_counter()
            for _ in range(self.micro_batches):
                losses = self._objective(self._engine, micro)
                self._engine.backward(losses.loss / masked)
                self._engine.step()
            if self.cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return times

    def reset_peak(self) -> None:
        """Let the highest memory begin at what is held now."""
        import torch

        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            _reset_peak()

    def peak_bytes(self, *, with_holes: bool = False) -> int:
        """Highest memory of the steps since the last reset, above `base_bytes`. On a GPU that is what tensors take;
        `with_holes`: what the allocator took from the device for them. (On a CPU holes always count.)"""
        import torch

        if self.cuda:
            return torch.cuda.max_memory_reserved() if with_holes else torch.cuda.max_memory_allocated()
        return peak_memory_bytes() - self.base_bytes


def random_rows(training: ResolvedTraining, mask_rate: float, rows: int) -> MicroBatch:
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
    return peak_memory_bytes()
