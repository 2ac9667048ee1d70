"""Where the weights of an export come from: named tensors that can be read a piece at a time.

Every form of an export is written from a `WeightSource`, so that no model has to be in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from exports.tensor_file import Spec

PIECE_ELEMENTS = 1 << 20
"""Values of one read: 4 MiB in fp32, so that they are still in the processor's cache when they are written."""


class WeightSource(Protocol):
    """Named tensors of which any range of elements can be read.

    A source may wrap another one, as `MeanWeights` does, and then computes each range when it is read. A quantised
    source needs no other protocol: its `specs` name an int8 tensor and a scale tensor for each matrix of the source
    that it wraps, and its `read` rounds a range of the matrix by the scale of its rows, which it computed in a first
    pass. Where the values shall stay floating (to measure what rounding costs), its specs are those of the wrapped
    source, and `read` gives rounded values.
    """

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Dtype and shape of every tensor, in the order in which a file should hold them."""

    def read(self, name: str, first: int, count: int) -> Tensor:
        """Elements `first` to `first + count` of the flattened tensor `name`, [count], in the dtype of its spec."""


def pieces(source: WeightSource, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The values of `names` in order, in flat pieces: (name, values)."""
    for name in names:
        elements = math.prod(source.specs[name].shape)
        for first in range(0, elements, PIECE_ELEMENTS):
            yield name, source.read(name, first, min(PIECE_ELEMENTS, elements - first))


def whole(source: WeightSource, name: str) -> Tensor:
    """The whole tensor `name`."""
    shape = source.specs[name].shape
    return source.read(name, 0, math.prod(shape)).view(shape)


def all_tensors(source: WeightSource) -> dict[str, Tensor]:
    """Every tensor whole, by its name."""
    return {name: whole(source, name) for name in source.specs}


class TensorWeights:
    """Weights that are in memory, or mapped into it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def read(self, name: str, first: int, count: int) -> Tensor:
        """See `WeightSource.read`."""
        return self.tensors[name].detach().reshape(-1)[first : first + count]


class SelectedWeights:
    """Some tensors of another source, in another order. Names that the other source lacks have no spec here."""

    def __init__(self, source: WeightSource, names: Sequence[str]) -> None:
        self.source = source
        self.specs = {name: source.specs[name] for name in names if name in source.specs}

    def read(self, name: str, first: int, count: int) -> Tensor:
        """See `WeightSource.read`."""
        return self.source.read(name, first, count)


class MeanWeights:
    """The mean of several sources of one model, summed in float64."""

    def __init__(self, sources: Sequence[WeightSource]) -> None:
        self.sources = sources
        self.specs = {name: Spec(torch.float32, spec.shape) for name, spec in sources[0].specs.items()}

    def read(self, name: str, first: int, count: int) -> Tensor:
        """See `WeightSource.read`."""
        total = torch.zeros(count, dtype=torch.float64)
        for source in self.sources:
            total += source.read(name, first, count)
        return (total / len(self.sources)).float()
