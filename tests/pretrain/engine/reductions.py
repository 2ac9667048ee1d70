"""When gradients of a small model are reduced, by ZeRO stage, on the ranks of torchrun; rank 0 prints a line of JSON.

For each stage a list of what happened in one backward pass, in order: the name of a parameter whose gradient is there,
or the number of elements of an all-reduce or reduce-scatter of floating-point numbers. "end" stands where autograd
returned.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import tiny_model

from pretrain import distributed
from pretrain.engine.config import ZeroRecipe, deepspeed_config
from pretrain.engine.engine import open_engine
from pretrain.engine.optimizer import OptimizerRecipe

COLLECTIVES = ("all_reduce", "reduce_scatter_tensor", "_reduce_scatter_base", "reduce_scatter", "reduce")


def record_collectives(happened: list[str | int]) -> None:
    """Note the size of every reduction of gradients in `happened`, from now on."""

    def noting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() > 1:
                happened.append(tensor.numel())
            return collective(tensor, *args, **kwargs)

        return call

    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, noting(getattr(dist, name)))


def backward_of(stage: int, happened: list[str | int]) -> list[str | int]:
    """What happens in the second step's backward pass, of one micro-batch."""
    model = tiny_model(mlm_head="untied", num_hidden_layers=3)
    names = {name: parameter for name, parameter in model.named_parameters() if "layers" in name or "decoder" in name}
    bucket = names["mlm_head.decoder.weight"].numel() - 1  # as in the real sizes: the decoder does not fit
    zero = ZeroRecipe(stage=stage, reduce_bucket_size=bucket)
    parameters = sum(p.numel() for p in model.parameters())
    config = deepspeed_config(
        zero=zero, precision="bf16", clip=0.5, micro_batch=2, micro_batches=1, parameters=parameters
    )
    engine = open_engine(model, config, OptimizerRecipe())
    for name, parameter in names.items():
        parameter.register_hook(lambda _, name=name: happened.append(name))  # type: ignore[misc]
    tokens = torch.randint(5, 250, (2, 16))
    positions = torch.arange(0, 32, 4)
    rest = {"positions": positions, "labels": tokens.flatten()[positions], "loss_weights": torch.ones(len(positions))}
    autograd = torch.autograd.backward

    def until_the_end(*args: Any, **kwargs: Any) -> None:
        autograd(*args, **kwargs)
        happened.append("end")

    for _ in range(2):
        engine.learning_rate = 1e-3
        loss_sum, _ = engine(tokens, **rest)
        happened.clear()
        torch.autograd.backward = until_the_end
        engine.backward(loss_sum / 16)
        torch.autograd.backward = autograd
        seen = list(happened)
        engine.step()
    return seen


if __name__ == "__main__":
    world = distributed.join(timeout_s=60)
    events: list[str | int] = []
    record_collectives(events)
    found = {stage: backward_of(stage, events) for stage in range(4)}
    if world.is_main:
        print(json.dumps(found))
    distributed.leave()
    distributed.exit_now(0)
