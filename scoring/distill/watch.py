"""The attention scores of a classifier's forward pass, before softmax. Models of transformers do not return them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from exports.bert_attention import keep_projections
from exports.distill_losses import scores_of
from sharebert.encoder import Layer, ShareBert


class AttentionScores:
    """Keeps the queries and keys of some layers of a model from now on.

    Args:
        model: a classifier of this project, or one of transformers whose layers have `attention.self.query` and `key`,
            as BERT's have.
        layers: numbers of layers, from 1.
        where: the model's folder, for messages.

    Raises BadInput: a model of transformers with other layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], where: str) -> None:
        self._layers = sorted(set(layers))
        self._seen: dict[tuple[int, str], Tensor] = {}
        encoder = getattr(model, "sharebert", None)
        if isinstance(encoder, ShareBert):
            self._scale = encoder.config.score_scale
            for number in self._layers:
                self._watch_ours(number, encoder.layers[number - 1])
            return
        where = f"finetune.distill.attention: {where}"
        self._scale = keep_projections(model, self._layers, ("query", "key"), self._seen, where)

    def take(self) -> dict[int, Tensor]:
        """Layer → scores [B, heads, T, T] of the last forward pass, which are forgotten."""
        seen = self._seen
        found = {
            number: scores_of((seen[number, "query"], seen[number, "key"], seen[number, "key"]), self._scale)
            for number in self._layers
        }
        seen.clear()
        return found

    def _watch_ours(self, number: int, layer: Any) -> None:
        assert isinstance(layer, Layer)
        project = layer.project

        def keeping(x: Tensor, weights: Any) -> tuple[Tensor, Tensor, Tensor]:
            found = project(x, weights)
            self._seen[number, "query"], self._seen[number, "key"], _ = found
            return found

        layer.project = keeping  # type: ignore[method-assign]  # there is no module at this place that could have a hook
