"""Where the time of a step goes: the kernels of three steps, and what is left between them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.kernels import MASK_RATE, SEQ_LEN, config_of
from pretrain import distributed
from pretrain.engine.config import ZeroRecipe, deepspeed_config
from pretrain.engine.engine import open_engine
from pretrain.engine.optimizer import OptimizerRecipe
from sharebert import ShareBertForMaskedLM, initialize

STEPS = 3


def profile_steps(folder: Path, device: str) -> Iterator[dict[str, Any]]:
    """Through the engine, in bf16 at ZeRO 1, with 64 and with 500 rows. Traces for Perfetto go into the folder."""
    world = distributed.join(timeout_s=60)
    for rows in (64, 500) if device == "cuda" else (2,):
        step = engine_step(rows, world.device)
        for _ in range(3):
            step()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
        with profile(activities=activities) as recorded:
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            if device == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - began
        recorded.export_chrome_trace(str(folder / f"trace-{rows}.json"))
        averages = recorded.key_averages()
        times = {event.key: (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total)
                 for event in averages}  # fmt: skip
        busy = sum(times.values()) / 1e3 / STEPS
        yield {"rows": rows, "ms a step": took * 1e3 / STEPS, "ms in kernels": busy, "trace": f"trace-{rows}.json"}
        for name, us in sorted(times.items(), key=lambda item: -item[1])[:15]:
            yield {"rows": rows, "kernel": name[:80], "ms a step": us / 1e3 / STEPS, "share": us / 1e3 / STEPS / busy}
    distributed.leave()


def engine_step(rows: int, device: torch.device) -> Any:
    """One training step of sharebert-small as the product makes it."""
    config = config_of(device.type)
    model = ShareBertForMaskedLM(config).train()
    initialize(model, "variance", 0)
    keys = deepspeed_config(
        zero=ZeroRecipe(),
        precision="bf16",
        clip=0.5,
        micro_batch=rows,
        micro_batches=1,
        parameters=sum(p.numel() for p in model.parameters()),
    )
    engine = open_engine(model, keys, OptimizerRecipe())
    tokens = torch.randint(5, config.vocab_size, (rows, SEQ_LEN), device=device)
    positions = torch.arange(0, tokens.numel(), round(1 / MASK_RATE), device=device)
    batch = {"positions": positions, "labels": tokens.flatten()[positions]}
    weights = torch.ones(len(positions), device=device)

    def step() -> None:
        engine.learning_rate = 1e-4
        loss_sum, _ = engine(tokens, loss_weights=weights, **batch)
        engine.backward(loss_sum / len(positions))
        engine.step()

    return step
