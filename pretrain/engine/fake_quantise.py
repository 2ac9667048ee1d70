"""Quantisation-aware training: the forward pass uses the weights that a quantised export will hold.

They are made once a micro-batch; see `exports/fake_quantise.py`. Checkpoints and exports hold ordinary weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from exports.fake_quantise import QuantiseRecipe, forward_rounded, rounded_matrices
from sharebert import ShareBertConfig, ShareBertForMaskedLM


class FakeQuantisedForMaskedLM(ShareBertForMaskedLM):
    """A model whose loss is that of its quantised weights. Its parameters are those of the plain model."""

    def __init__(self, config: ShareBertConfig, recipe: QuantiseRecipe) -> None:
        super().__init__(config)
        self.recipe = recipe

    def forward(self, *given: Any, **named: Any) -> Any:
        """See `ShareBertForMaskedLM.forward`."""
        return forward_rounded(self, ShareBertForMaskedLM, self.recipe, given, named)

    def rounded(self) -> dict[str, Tensor]:
        """The rounded matrices by their names, in the dtype of the weights."""
        return rounded_matrices(self, self.recipe)
