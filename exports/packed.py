"""The compact form with tensors packed into a few bits a number; see `sharebert/packed.py` for the layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from exports.compact import Compact, stored_weights
from exports.export import Export
from exports.weight_source import TensorWeights, WeightSource, whole
from sharebert.packed import ROTATION, Packing


@dataclass(frozen=True)
class Packed(Compact):
    """The learned parameters; those in `packings` as the tensors of `sharebert.packed.stored`."""

    packings: Mapping[str, Packing] = field(default_factory=dict)
    """How each packed tensor is packed, by its name."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """What is stored of the packed tensors, and the rotation, where there is one."""

    def weights(self, export: Export) -> WeightSource:
        """See `Compact.weights`."""
        plain = stored_weights(export)
        kept = {name: whole(plain, name) for name in plain.specs if name not in self.packings}
        return TensorWeights(kept | dict(self.parts))

    def further_keys(self) -> dict[str, Any]:
        """See `Compact.further_keys`."""
        tensors = {name: {**packing._asdict(), "shape": list(packing.shape)} for name, packing in self.packings.items()}
        return {"packing": {"rotated": ROTATION in self.parts, "tensors": tensors}}
