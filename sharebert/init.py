"""The start of a new model: every parameter depends on the seed and its own name alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .config import ShareBertError
from .encoder import ShareBert
from .heads import ShareBertForMaskedLM
from .roles import Distribution, Normal, Start, Uniform, parameter_roles

INITS = Start._fields
"""`authors` and `variance`."""


@torch.no_grad()
def initialize(model: ShareBert | ShareBertForMaskedLM, init: str, seed: int) -> None:
    """Fill all parameters of `model`, which must be whole (not yet partitioned), on any device, in any dtype.

    `authors`: linear and embedding weights N(0, initializer_range²), the head's dense weight and bias uniform in
    ±1/√H, biases of the layers and the pooler N(0, 1), biases of other linear modules 0.
    `variance`: the same, except that W_all is N(0, 1/F), so that generated matrices start with standard deviation
    initializer_range, and that biases of the layers and the pooler are 0.

    The values depend on the seed and on each parameter's name. They do not depend on the rank, the device, other
    parameters or the state of any generator; the dtype only rounds them.

    Raises ShareBertError for an unknown `init`.
    """
    if init not in INITS:
        raise ShareBertError(f"init: one of {', '.join(INITS)} (got {init!r})")
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}/{name.removeprefix('sharebert.')}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        values = torch.empty(parameter.shape, dtype=torch.float32)
        fill(values, getattr(roles[name].start, init), generator)
        parameter.copy_(values)


def fill(values: Tensor, distribution: Distribution, generator: torch.Generator | None = None) -> None:
    """Draw all elements of `values`, in place."""
    if isinstance(distribution, Normal):
        values.normal_(0.0, distribution.std, generator=generator)
    elif isinstance(distribution, Uniform):
        values.uniform_(-distribution.bound, distribution.bound, generator=generator)
    else:
        values.fill_(distribution.value)
