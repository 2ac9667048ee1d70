"""What the engine costs on one rank of a CPU, as a line of JSON.

`reads`: by stage, how often an optimizer step reads a tensor's value on the host. On a GPU each read waits for all that
the device has to do. The counted step is one after the first two, which set up the optimizer's state. At stage 0 this
fails if DeepSpeed gathers the gradients.

`synchronisations`: by stage, how often the same step waits for the whole device.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import distributed
from pretrain.engine.config import ZeroRecipe, deepspeed_config
from pretrain.engine.deepspeed_import import import_deepspeed
from pretrain.engine.engine import Engine, open_engine
from pretrain.engine.optimizer import OptimizerRecipe


class Reads(TorchDispatchMode):
    """Counts `.item()`, `bool(tensor)` and their like."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def engine_of(model: torch.nn.Module, stage: int) -> Engine:
    parameters = sum(p.numel() for p in model.parameters())
    config = deepspeed_config(
        zero=ZeroRecipe(stage=stage), precision="bf16", clip=0.5, micro_batch=2, micro_batches=2, parameters=parameters
    )
    return open_engine(model, config, OptimizerRecipe())


def refuse(tensors: Any) -> Any:
    raise AssertionError("one rank's gradients are gathered to be added to nobody's")


def count_synchronisations() -> list[int]:
    """A counter in a list. A CPU's accelerator has nothing to wait for, so its function only counts from now on."""
    count = [0]
    accelerator = import_deepspeed().accelerator.get_accelerator()

    def synchronize(*_: Any) -> None:
        count[0] += 1

    accelerator.synchronize = synchronize
    return count


def costs_of(stage: int, synchronisations: list[int]) -> tuple[int, int]:
    """Reads and synchronisations of a step."""
    engine = engine_of(tiny_model(hidden_dropout_prob=0.1), stage)
    if stage == 0:
        engine._deepspeed.flatten = refuse
    tokens = torch.randint(5, 250, (2, 16))
    positions = torch.arange(0, 32, 4)
    rest = {"positions": positions, "labels": tokens.flatten()[positions], "loss_weights": torch.ones(len(positions))}
    for _ in range(3):
        engine.learning_rate = 1e-3
        synchronisations[0] = 0
        with Reads() as reads:
            for _ in range(2):
                loss_sum, _ = engine(tokens, **rest)
                engine.backward(loss_sum / 16)
                engine.step()
    return reads.count, synchronisations[0]


if __name__ == "__main__":
    distributed.join(timeout_s=60)
    count = count_synchronisations()
    costs = {stage: costs_of(stage, count) for stage in range(4)}
    reads, synchronisations = ({stage: both[n] for stage, both in costs.items()} for n in range(2))
    print(json.dumps({"reads": reads, "synchronisations": synchronisations}))
    distributed.leave()
