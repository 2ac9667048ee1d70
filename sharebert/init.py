"""How a new model starts: every parameter from the seed and its own name, and from nothing else."""

from __future__ import annotations

import hashlib
from math import sqrt

import torch
from torch import Tensor, nn

from .config import ShareBertConfig, ShareBertError
from .encoder import ShareBert
from .heads import ShareBertForMaskedLM

INITS = ("authors", "variance")


@torch.no_grad()
def initialize(model: ShareBert | ShareBertForMaskedLM, init: str, seed: int) -> None:
    """Fill all parameters of `model`, whole (not yet partitioned), on any device, in any dtype.

    `authors`: linear and embedding weights N(0, initializer_range), the head's dense uniform ±1/√H, the
    layers' and the pooler's biases N(0, 1), linear biases 0.
    `variance`: the same but W_all N(0, 1/F), so that generated weights begin with standard deviation
    initializer_range, and layer and pooler biases 0.

    The values depend on the seed and each parameter's name: not on the rank, the device, the dtype (but for
    rounding), other parameters, or any generator's state.

    Raises ShareBertError: an unknown `init`.
    """
    if init not in INITS:
        raise ShareBertError(f"init: one of {', '.join(INITS)} (got {init!r})")
    for name, parameter in model.named_parameters():
        name = name.removeprefix("sharebert.")
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        values = torch.empty(parameter.shape, dtype=torch.float32)
        _fill(values, name, model.config, init, generator)
        parameter.copy_(values)


def _fill(values: Tensor, name: str, config: ShareBertConfig, init: str, generator: torch.Generator) -> None:
    module, _, leaf = name.rpartition(".")
    if module.endswith("norm"):
        nn.init.constant_(values, 1.0 if leaf == "weight" else 0.0)
    elif module == "mlm_head.dense":
        bound = 1 / sqrt(config.hidden_size)
        values.uniform_(-bound, bound, generator=generator)
    elif leaf.endswith("_bias"):
        if init == "authors":
            values.normal_(0.0, 1.0, generator=generator)
        else:
            values.zero_()
    elif leaf == "bias":
        values.zero_()
    elif module == "factor_linear_all" and init == "variance":
        values.normal_(0.0, 1 / sqrt(config.factor_size), generator=generator)
    else:
        values.normal_(0.0, config.initializer_range, generator=generator)
