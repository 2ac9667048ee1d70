"""What each parameter is for: whether weight decay acts on it, and how it starts.

A module says it where it makes the parameter, with `set_roles`. Optimizers and `initialize` ask `parameter_roles`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import nn

from .config import ShareBertError


class Normal(NamedTuple):
    """A normal distribution with mean 0."""

    std: float


class Uniform(NamedTuple):
    """A uniform distribution over [-bound, bound]."""

    bound: float


class Constant(NamedTuple):
    """One value for all elements."""

    value: float


Distribution = Normal | Uniform | Constant


class Start(NamedTuple):
    """How the elements of a parameter start, one field for each `init` of `initialize`."""

    authors: Distribution
    """As in the authors' implementation."""
    variance: Distribution
    """So that generated matrices start with standard deviation `initializer_range`, and layer biases with 0."""


class Role(NamedTuple):
    """What a parameter is for."""

    decayed: bool
    """Whether weight decay acts on it."""
    start: Start
    """How it starts."""
    generates: bool = False
    """Whether the standard deviation of the generated matrices is proportional to its own."""


def weight_role(std: float) -> Role:
    """The role of an embedding or a matrix: decayed, and N(0, std²) at the start."""
    return Role(True, Start(Normal(std), Normal(std)))


ZERO_BIAS = Role(False, Start(Constant(0.0), Constant(0.0)))
"""A bias that starts at 0."""

LAYER_BIAS = Role(False, Start(Normal(1.0), Constant(0.0)))
"""A bias after a generated matrix. The authors start it at N(0, 1)."""

NORM_WEIGHT = Role(False, Start(Constant(1.0), Constant(1.0)))
"""The weight of a LayerNorm."""

FACTOR_NORM_WEIGHT = NORM_WEIGHT._replace(decayed=True)
"""The weight of a factor norm. The authors decay it, unlike the other LayerNorms."""

M = TypeVar("M", bound=nn.Module)


def set_roles(module: M, **roles: Role) -> M:
    """Say the role of parameters that `module` itself holds, by name; returns the module."""
    module.roles = {**getattr(module, "roles", {}), **roles}  # type: ignore[assignment]
    return module


def own_roles(module: nn.Module) -> dict[str, Role]:
    """The roles of parameters that `module` itself holds, by name; empty if it says none."""
    return getattr(module, "roles", {})  # type: ignore[return-value]


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter of `model`, by name, in the order of `named_parameters`.

    Raises ShareBertError for a parameter whose module says no role for it; the message names the parameter.
    """
    found = {}
    for name, _ in model.named_parameters():
        path, _, own_name = name.rpartition(".")
        roles = own_roles(model.get_submodule(path))
        if own_name not in roles:
            raise ShareBertError(f"parameter '{name}' has no role: its module must name it in `set_roles`")
        found[name] = roles[own_name]
    return found
