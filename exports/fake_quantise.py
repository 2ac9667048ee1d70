"""The weights that a quantised export will hold, in a forward pass that is trained.

Each matrix that the compression step `quantise` packs is replaced by the numbers that its codes stand for. Its gradient
goes to the weight as it is (straight-through: Bengio, Léonard, Courville, arXiv 1308.3432), so that a model holds
ordinary weights, and the step `quantise` with the same keys and `rounding: nearest` makes the codes of the last forward
pass.

A scale is that of the range of its group, so it follows the group's least and greatest number. With `scales: learned`
these two get its gradient, that of LSQ (Esser et al., "Learned Step Size Quantization", ICLR 2020, equations 1 to 3):
∂ŵ/∂s = code − w/s, scaled by 1 / √(N·Q) with N numbers of a group and Q the greatest code. LSQ has parameters for
scales; here the two numbers are the parameters, so that a model has no further tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as recipe_dataclass
from torch import Tensor, nn
from torch.func import functional_call

from exports.packed import bits_of, is_matrix
from exports.rounding import grid, limits, reduced, to_nearest
from sharebert.packed import Packing
from sharebert_common.recipe import STRICT


@recipe_dataclass(config=STRICT, kw_only=True)
class QuantiseRecipe:
    """How the matrices are rounded in each forward pass; the keys of the compression step `quantise`."""

    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    """Bits of a number of E, and of an untied head's decoder; none: train without rounding."""
    small_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    """Bits of the small matrices: W_all, factor_linear and a tied head's; none: as `bits`."""
    scheme: Literal["symmetric", "asymmetric", "midpoint"] = "asymmetric"
    """How the range of a group becomes codes; see sharebert/packed.py."""
    group: Annotated[int, Field(ge=-1)] = 0
    """Neighbours of a row that share a scale; 0: a whole row; -1: the whole matrix."""
    scales: Literal["range", "learned"] = "range"
    """Whether scales have gradients of their own: with `learned`, the ends of a group's range get them, as in LSQ."""

    def packing_of(self, name: str, shape: Sequence[int]) -> Packing:
        """How the step `quantise` packs a matrix of that name and shape with the same keys."""
        assert self.bits is not None
        bits = bits_of(name, shape, self.bits, self.small_bits)
        return Packing(tuple(shape), bits, self.scheme, self.group)


def rounded_matrices(model: nn.Module, recipe: QuantiseRecipe) -> dict[str, Tensor]:
    """The rounded matrices of a model by their names, in the dtypes of the weights; gradients go straight through."""
    make = with_learned_scales if recipe.scales == "learned" else _StraightThrough.apply
    return {
        name: make(parameter.float(), recipe.packing_of(name, parameter.shape)).to(parameter.dtype)
        for name, parameter in model.named_parameters()
        if is_matrix(name)
    }


def with_learned_scales(matrix: Tensor, packing: Packing) -> Tensor:
    """The numbers that the nearest codes stand for, [rows, columns], with LSQ's gradients for weights and scales."""
    scales, offsets = grid(matrix.detach(), packing)
    low, high = reduced(matrix, packing, torch.amin), reduced(matrix, packing, torch.amax)
    lowest, highest = limits(packing)
    if packing.scheme == "symmetric":
        soft, middle = torch.maximum(-low, high) / (2 ** (packing.bits - 1) - 1), None
    elif packing.scheme == "asymmetric":
        soft, middle = (high - low) / (2**packing.bits - 1), low
    else:
        soft, middle = (high - low) / 2**packing.bits, (high + low) / 2
    count = matrix.numel() / soft.numel()
    share = (count * (highest - packing.zero)) ** -0.5
    step = packing.spread(_same_value(scales, soft * share))
    shift = 0.0 if middle is None or offsets is None else packing.spread(_same_value(offsets, middle))
    places = (matrix - shift) / step
    codes = _same_value(torch.round(places), places) + packing.zero
    return (codes.clamp(lowest, highest) - packing.zero) * step + shift


def _same_value(value: Tensor, gradient: Tensor) -> Tensor:
    """A tensor with the value of one and the gradient of another."""
    return value.detach() + (gradient - gradient.detach())


def forward_rounded(
    model: nn.Module,
    plain_class: type[nn.Module],
    recipe: QuantiseRecipe,
    given: tuple[Any, ...],
    named: dict[str, Any],
) -> Any:
    """What `plain_class.forward` returns for a model of a class derived from it, with rounded matrices."""
    rounded = {f"model.{name}": values for name, values in rounded_matrices(model, recipe).items()}
    return functional_call(_PlainForward(model, plain_class), rounded, given, named)


class _PlainForward(nn.Module):
    """The forward pass of the plain class, as a module of its own: one that has no forward hooks."""

    def __init__(self, model: nn.Module, plain_class: type[nn.Module]) -> None:
        super().__init__()
        self.model, self._plain_class = model, plain_class

    def forward(self, *given: Any, **named: Any) -> Any:
        """See the plain class."""
        return self._plain_class.forward(self.model, *given, **named)


class _StraightThrough(torch.autograd.Function):
    """The numbers that the nearest codes stand for, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, packing: Packing) -> Tensor:
        return to_nearest(matrix, packing).values(packing)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None
