"""The parts of the generated matrices that a model with pruned heads or columns uses.

The matrices are generated whole, because a row of E feeds all of them: to cut rows of E away would take nothing from
one head alone. They are sliced then, once, and every product of a layer is as small as the slices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import ShareBertConfig


class Slices(NamedTuple):
    """Which rows or columns of the matrices of a layer are used; None: all."""

    channels: tuple[int, ...] | None
    """Columns of query, key and value, and rows of the attention output's matrix."""
    inner: tuple[int, ...] | None
    """Columns of the intermediate matrix, and rows of the output's."""

    def cut(self, name: str, matrix: Tensor, scale: Tensor | None) -> Tensor:
        """The used part of the matrix [in, out] with a name of `sharing.Weights`, its rows multiplied by `scale`."""
        dimension, kept = {
            "query": (1, self.channels),
            "key": (1, self.channels),
            "value": (1, self.channels),
            "attention_output": (0, self.channels),
            "intermediate": (1, self.inner),
            "output": (0, self.inner),
        }.get(name, (0, None))
        if kept is not None:
            matrix = matrix.index_select(dimension, torch.tensor(kept, device=matrix.device))
        return matrix if scale is None else matrix * scale.to(matrix.dtype)[:, None]


def slices_of(config: ShareBertConfig) -> Slices | None:
    """The slices of a model; None where nothing was pruned."""
    if config.kept_heads is None and config.kept_columns is None:
        return None
    size = config.head_size
    channels = (
        None if config.kept_heads is None else tuple(h * size + i for h in config.kept_heads for i in range(size))
    )
    return Slices(channels, config.kept_columns)
