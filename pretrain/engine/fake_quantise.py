"""Quantisation-aware training: the forward pass uses the weights that a quantised export will hold.

Each matrix that the compression step `quantise` packs is replaced, once a micro-batch, by the numbers that its codes
stand for. Its gradient goes to the weight as it is (straight-through: Bengio, Léonard, Courville, arXiv 1308.3432), so
checkpoints and exports hold ordinary weights, and the step `quantise` with the same keys and `rounding: nearest` makes
the codes of the last forward pass. Scales are those of the range of each group, and follow the weights.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as recipe_dataclass
from torch import Tensor, nn
from torch.func import functional_call

from exports.packed import bits_of, is_matrix
from exports.rounding import to_nearest
from sharebert import ShareBertConfig, ShareBertForMaskedLM
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


class FakeQuantisedForMaskedLM(ShareBertForMaskedLM):
    """A model whose loss is that of its quantised weights. Its parameters are those of the plain model."""

    def __init__(self, config: ShareBertConfig, recipe: QuantiseRecipe) -> None:
        super().__init__(config)
        self.recipe = recipe

    def forward(self, *given: Any, **named: Any) -> Any:
        """See `ShareBertForMaskedLM.forward`."""
        return functional_call(_PlainForward(self), self.rounded(), given, named)

    def rounded(self) -> dict[str, Tensor]:
        """The rounded matrices by the names that `_PlainForward` gives them, in the dtype of the weights."""
        found = {}
        for name, parameter in self.named_parameters():
            if is_matrix(name):
                values = _StraightThrough.apply(parameter.float(), self.packing_of(name, parameter))
                found[f"model.{name}"] = values.to(parameter.dtype)
        return found

    def packing_of(self, name: str, matrix: Tensor) -> Packing:
        """How the step `quantise` packs a matrix with the same keys."""
        assert self.recipe.bits is not None
        bits = bits_of(name, matrix.shape, self.recipe.bits, self.recipe.small_bits)
        return Packing(tuple(matrix.shape), bits, self.recipe.scheme, self.recipe.group)


class _PlainForward(nn.Module):
    """The forward pass of the plain model, as a module of its own: one that has no forward hooks."""

    def __init__(self, model: ShareBertForMaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Any, **named: Any) -> Any:
        """See `ShareBertForMaskedLM.forward`."""
        return ShareBertForMaskedLM.forward(self.model, *given, **named)


class _StraightThrough(torch.autograd.Function):
    """The numbers that the nearest codes stand for, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, packing: Packing) -> Tensor:
        return to_nearest(matrix, packing).values(packing)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None
