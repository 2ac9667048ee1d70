"""What the engine costs on one rank of a CPU, as a line of JSON.

`reads`: by stage, how often an optimizer step reads a tensor's value on the host. On a GPU each read waits for all that
the device has to do. The counted step is one after the first two, which set up the optimizer's state. At stage 0 this
fails if DeepSpeed gathers the gradients.

`mapped`: of ten blocks of 8 MiB, how many glibc maps on their own, to give each back when it is freed: with engines of
small models, and then with one of a model of a published size. Null without glibc 2.33 or later.
"""

from __future__ import annotations

import ctypes
import json
from typing import Any

import torch
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import distributed
from pretrain.engine.engine import OptimizerRecipe, build_engine, deepspeed_config, optimizer_step, set_learning_rate

BLOCK_ELEMENTS = 2 * 2**20
"""8 MiB in float32."""


class Reads(TorchDispatchMode):
    """Counts `.item()`, `bool(tensor)` and their like."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def engine_of(model: torch.nn.Module, stage: int) -> Any:
    parameters = sum(p.numel() for p in model.parameters())
    config = deepspeed_config(
        zero={"stage": stage}, precision="bf16", clip=0.5, micro_batch=2, micro_batches=2, parameters=parameters
    )
    return build_engine(model, config, OptimizerRecipe())


def refuse(tensors: Any) -> Any:
    raise AssertionError("one rank's gradients are gathered to be added to nobody's")


def reads_of(stage: int) -> int:
    engine = engine_of(tiny_model(hidden_dropout_prob=0.1), stage)
    if stage == 0:
        engine.flatten = refuse
    tokens = torch.randint(5, 250, (2, 16))
    positions = torch.arange(0, 32, 4)
    rest = {"positions": positions, "labels": tokens.flatten()[positions], "loss_weights": torch.ones(len(positions))}
    for _ in range(3):
        set_learning_rate(engine, 1e-3)
        with Reads() as reads:
            for _ in range(2):
                loss_sum, _ = engine(tokens, **rest)
                engine.backward(loss_sum / 16, scale_wrt_gas=False)
                optimizer_step(engine, 0.5)
    return reads.count


class MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`; `hblks` is the number of mapped blocks."""

    NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


HELD: list[torch.Tensor] = []
"""The blocks that were counted: freed, they would be what the next ones are cut from."""


def mapped_blocks() -> int | None:
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return None
    mallinfo.restype = MallInfo
    torch.ones(2 * BLOCK_ELEMENTS)  # freed at once: by itself glibc maps no smaller block from then on
    before = mallinfo().hblks
    HELD.extend(torch.ones(BLOCK_ELEMENTS) for _ in range(10))
    return int(mallinfo().hblks - before)


if __name__ == "__main__":
    distributed.join(timeout_s=60)
    reads = {stage: reads_of(stage) for stage in range(4)}
    mapped_small = mapped_blocks()
    engine_of(torch.nn.Linear(2400, 2400), 0)  # 5.8 M parameters
    print(json.dumps({"reads": reads, "mapped": [mapped_small, mapped_blocks()]}))
    distributed.leave()
