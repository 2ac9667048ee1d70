"""Quantisation-aware fine-tuning: the forward pass rounds the matrices; see `exports/fake_quantise.py`."""

from __future__ import annotations

from typing import Any

from exports.fake_quantise import QuantiseRecipe, forward_rounded
from sharebert.hub import ShareBertForSequenceClassification, ShareBertHubConfig


class FakeQuantisedClassifier(ShareBertForSequenceClassification):
    """A classifier whose loss and scores are those of its quantised weights; its tensors are those of the plain one."""

    def __init__(self, config: ShareBertHubConfig, recipe: QuantiseRecipe) -> None:
        super().__init__(config)
        self.recipe = recipe

    def forward(self, *given: Any, **named: Any) -> Any:
        """See `ShareBertForSequenceClassification.forward`."""
        return forward_rounded(self, ShareBertForSequenceClassification, self.recipe, given, named)
