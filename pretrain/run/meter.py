"""What a logging interval measures: sums over its steps, which are read once at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist

from pretrain.data.datasets import DataRecipe
from pretrain.data.loader import StepBatch
from pretrain.distributed import World
from pretrain.engine.engine import Engine
from pretrain.flops import flops_per_token, peak_flops_of
from pretrain.objective import LossSums
from pretrain.run.metric_log import MonitorRecipe
from sharebert import ShareBertConfig
from sharebert_common.processes import peak_memory_bytes


class Meter:
    """Adds up on the device, so that the host waits for the device only at the end of an interval."""

    def __init__(
        self,
        world: World,
        model: ShareBertConfig,
        seq_len: int,
        data: DataRecipe,
        micro_rows: int,
        recipe: MonitorRecipe,
    ) -> None:
        self._world, self._seq_len, self._global_batch = world, seq_len, data.global_batch
        self._model, self._mask_rate, self._micro_tokens = model, data.highest_mask_rate, micro_rows * seq_len
        self._lengths_vary = data.row_length.first is not None
        self._peak = recipe.peak_flops or peak_flops_of(world.device)
        self._step_sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.own_work_s: list[float] = []
        """Each rank's own work in the last interval: waiting for rows, and forward passes. (Under ZeRO 3 a forward
        pass also waits for other ranks' weights, so there it says little.)"""
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self._sums.zero_()
        self.start_clock()

    def start_clock(self) -> None:
        """Time the interval from now on: its speeds are those of the steps that follow."""
        self._steps, self._waited_s, self._skipped_s, self._forward_s = 0, 0.0, 0.0, 0.0
        self._row_lengths = 0
        self._ranks_s, self._saves_s = 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._started = self._paused_from = time.perf_counter()

    def state(self) -> list[float]:
        """The sums of loss, right words and masked words over the steps of the interval so far, over all ranks. A
        collective."""
        sums = self._sums.clone()
        dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def load_state(self, state: Sequence[float]) -> None:
        """Go on with the interval in which `state` was taken, on any number of ranks. Its time begins anew.

        The sums are those of an interval that was not cut, bit for bit: sums of a few thousand fp32 values are exact in
        float64, in any order.
        """
        self.reset()
        if self._world.is_main:
            self._sums.copy_(torch.tensor(state, dtype=torch.float64))

    def add(self, losses: LossSums) -> None:
        """Count one micro-batch."""
        self._step_sums[0] += losses.loss.detach()
        self._step_sums[1] += losses.correct

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """Time what this rank does by itself, with the device's clock."""
        if self._world.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._forward_s += time.perf_counter() - started

    @contextmanager
    def waiting_for(self, what: Literal["ranks", "saves"]) -> Iterator[None]:
        """Time what this rank waits for."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        if what == "ranks":
            self._ranks_s += seconds
        else:
            self._saves_s += seconds

    def end_step(self, batch: StepBatch, *, skipped: bool) -> None:
        """Count one optimizer step. The loss of a skipped step is not a number and is left out."""
        if not skipped:
            self._sums[:2] += self._step_sums
            self._sums[2] += batch.masked
        self._step_sums.zero_()
        self._steps += 1
        self._row_lengths += batch.row_length
        self._waited_s += batch.wait_s
        self._paused_from = time.perf_counter()

    def skip_time(self) -> None:
        """Leave the time since the last step out of the speeds, because a validation took it."""
        self._skipped_s += time.perf_counter() - self._paused_from

    def read(self, step: int, engine: Engine, batch: StepBatch) -> dict[str, Any]:
        """The interval's line of the log; a new interval begins. A collective. What is not known is None."""
        per_rank = torch.zeros(self._world.world_size, dtype=torch.float64, device=self._world.device)
        sums = torch.cat([self._sums, per_rank])
        sums[3 + self._world.rank] = self._own_s()
        dist.all_reduce(sums)
        loss_sum, correct, masked, *self.own_work_s = sums.tolist()
        seconds = time.perf_counter() - self._started - self._skipped_s
        tokens_per_s = self._steps * self._global_batch * self._seq_len / seconds
        row_length = self._row_lengths / self._steps
        flops = flops_per_token(self._model, row_length, self._mask_rate, self._micro_tokens)  # linear in the length
        line = {
            "step": step,
            "epoch": batch.epoch,
            "rows": batch.rows_consumed,
            "tokens": batch.rows_consumed * self._seq_len,
            "loss": loss_sum / masked if masked else None,
            "accuracy": correct / masked if masked else None,
            "lr": engine.learning_rate,
            "grad_norm": norm if math.isfinite(norm := engine.gradient_norm) else None,
            "loss_scale": engine.loss_scale,
            "skipped": engine.skipped_steps,
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * flops / (self._peak * self._world.world_size) if self._peak else None,
            "data_wait_s": self._waited_s / self._steps,
            "rank_wait_s": self._ranks_s / self._steps,
            "save_wait_s": self._saves_s / self._steps,
            "step_s": seconds / self._steps,
            "memory_bytes": _peak_memory_bytes(self._world.device),
        }
        if self._lengths_vary:
            line["row_length"] = batch.row_length
        self.reset()
        return line

    def _own_s(self) -> float:
        if self._events:
            self._events[-1][1].synchronize()
        forward_s = sum(start.elapsed_time(end) for start, end in self._events) / 1000
        return self._waited_s + self._forward_s + forward_s


def _peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: of the device, or on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes()
