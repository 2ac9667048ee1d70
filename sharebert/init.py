"""The start of a new model: every parameter depends on the seed and its own name alone."""

from __future__ import annotations

import hashlib
from math import sqrt

import torch
from torch import Tensor

from .config import ShareBertConfig, ShareBertError
from .encoder import ShareBert
from .heads import ShareBertForMaskedLM
from .roles import Distribution, Normal, Start, Uniform, parameter_roles

INITS = Start._fields
"""`authors` and `variance`."""


@torch.no_grad()
def initialize(model: ShareBert | ShareBertForMaskedLM, init: str, seed: int, scale: float | None = None) -> None:
    """Fill all parameters of `model`, which must be whole (not yet partitioned), on any device, in any dtype.

    `authors`: linear and embedding weights N(0, initializer_range²), the head's dense weight and bias uniform in
    ±1/√H, biases of the layers and the pooler N(0, 1), biases of other linear modules 0.
    `variance`: the same, except that W_all is N(0, 1/F), so that generated matrices start with standard deviation
    initializer_range, and that biases of the layers and the pooler are 0.
    `scale`: with it, under either `init`, the generated matrices start with standard deviation scale / √H. Then their
    products have the same size at every width H. VEPS draws W_all accordingly, EPS draws E.

    The values depend on the seed and on each parameter's name. They do not depend on the rank, the device, other
    parameters or the state of any generator; the dtype only rounds them.

    Raises ShareBertError for an unknown `init`, and for a `scale` that is not above 0.
    """
    if scale is not None and scale <= 0:
        raise ShareBertError(f"init_scale: must be above 0 (got {scale!r})")
    if init not in INITS:
        raise ShareBertError(f"init: one of {', '.join(INITS)} (got {init!r})")
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}/{name.removeprefix('sharebert.')}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        values = torch.empty(parameter.shape, dtype=torch.float32)
        start = getattr(roles[name].start, init)
        if scale is not None and roles[name].generates:
            start = Normal(generator_std(model.config, scale))
        fill(values, start, generator)
        parameter.copy_(values)


def generator_std(config: ShareBertConfig, scale: float) -> float:
    """The standard deviation of W_all (EPS: of E; else of the matrices) with which the matrices have scale / √H.

    An element of a generated matrix is a sum of F products of an element of E and one of W_all.
    """
    std = scale / sqrt(config.hidden_size)
    return std if config.sharing != "veps" else std / (config.initializer_range * sqrt(config.factor_size))


def fill(values: Tensor, distribution: Distribution, generator: torch.Generator | None = None) -> None:
    """Draw all elements of `values`, in place."""
    if isinstance(distribution, Normal):
        values.normal_(0.0, distribution.std, generator=generator)
    elif isinstance(distribution, Uniform):
        values.uniform_(-distribution.bound, distribution.bound, generator=generator)
    else:
        values.fill_(distribution.value)
