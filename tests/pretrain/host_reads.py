"""Count, on one rank, how often an optimizer step reads a tensor's value on the host; prints {stage: reads} as JSON.

On a GPU each read waits for all that the device has to do. The counted step is one after the first two, which set up
the optimizer's state.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import distributed
from pretrain.engine import OptimizerRecipe, build_engine, deepspeed_config, optimizer_step, set_learning_rate


class Reads(TorchDispatchMode):
    """Counts `.item()`, `bool(tensor)` and their like."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads_of(stage: int) -> int:
    config = deepspeed_config(
        zero={"stage": stage}, precision="bf16", clip=0.5, micro_batch=2, micro_batches=2, parameters=20_000
    )
    engine = build_engine(tiny_model(hidden_dropout_prob=0.1), config, OptimizerRecipe())
    tokens = torch.randint(5, 250, (2, 16))
    positions = torch.arange(0, 32, 4)
    rest = {"positions": positions, "labels": tokens.flatten()[positions], "weights": torch.ones(len(positions))}
    for _ in range(3):
        set_learning_rate(engine, 1e-3)
        with Reads() as reads:
            for _ in range(2):
                loss_sum, _ = engine(tokens, **rest)
                engine.backward(loss_sum / 16, scale_wrt_gas=False)
                optimizer_step(engine, 0.5)
    return reads.count


if __name__ == "__main__":
    distributed.join(timeout_s=60)
    print(json.dumps({stage: reads_of(stage) for stage in range(4)}))
    distributed.leave()
