"""The compact form with tensors packed into a few bits a number; see `sharebert/packed.py` for the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from exports.compact import Compact, stored_weights
from exports.export import Export
from exports.weight_source import TensorWeights, WeightSource, whole
from sharebert.packed import ROTATED, ROTATION, Packing

LARGE = ("sharebert.word_embeddings.weight", "mlm_head.decoder.weight")

FACTORS = (*ROTATED, "sharebert.factor_linear.weight", "mlm_head.dense.weight", "mlm_head.decoder.weight")
"""The matrices that are quantised, with those of OWN. All others are vectors, or have a row a position or a type."""

SMALL = 2_000_000
"""Numbers below which a matrix is small. An untied head's dense [H, H] is not, at the published sizes."""


OWN = "sharebert.sharing."
"""How the names of matrices begin that no embedding generates."""


def is_matrix(name: str) -> bool:
    """Whether a tensor is one of the matrices that are quantised; all others are vectors."""
    return name in FACTORS or name.startswith(OWN)


def is_pruned(name: str) -> bool:
    """Whether the step `prune_weights` sets weights of a tensor to zero: E, W_all, and the layers' own matrices."""
    return name in ROTATED or (name.startswith(OWN) and not name.removeprefix(OWN).startswith("pooler"))


def bits_of(name: str, shape: Sequence[int], bits: int, small_bits: int | None) -> int:
    """Bits of a number of a matrix: `small_bits`, where there are some, for a small one."""
    small = name not in LARGE and shape[0] * shape[1] < SMALL
    return small_bits or bits if small else bits


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
