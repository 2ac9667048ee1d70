"""A model that keeps the queries, keys and values of its layers until its next forward pass."""

from __future__ import annotations

from torch import Tensor

from sharebert import MlmOutput, ShareBert, ShareBertConfig, ShareBertForMaskedLM
from sharebert.encoder import Layer
from sharebert.sharing import Weights


class RecordingLayer(Layer):
    """A layer that keeps its last `project`."""

    projected: tuple[Tensor, Tensor, Tensor] | None = None

    def project(self, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        """See `Layer.project`."""
        self.projected = super().project(x, weights)
        return self.projected

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, T, d] of the last forward pass, which are forgotten."""
        assert self.projected is not None, "no forward pass was made"
        taken, self.projected = self.projected, None
        return taken


class RecordingShareBert(ShareBert):
    """An encoder of such layers."""

    layer_class = RecordingLayer

    def take(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `RecordingLayer.take` returns, of the layer with this number, from 1."""
        found = self.layers[layer - 1]
        assert isinstance(found, RecordingLayer)
        return found.take()

    def forget(self) -> None:
        """Drop what no one took, so that its memory is free."""
        for layer in self.layers:
            assert isinstance(layer, RecordingLayer)
            layer.projected = None


class RecordingForMaskedLM(ShareBertForMaskedLM):
    """Such an encoder with its MLM head. Its parameters have the names of the plain model's."""

    sharebert: RecordingShareBert

    def __init__(self, config: ShareBertConfig) -> None:
        super().__init__(config)
        self.sharebert = RecordingShareBert(config)

    def scores(self, rows: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, H]."""
        made = self._head(rows)
        assert isinstance(made, Tensor)
        return made

    def mlm_loss(self, rows: Tensor, labels: Tensor, loss_weights: Tensor) -> MlmOutput:
        """The masked-LM loss of hidden states [N, H]; labels and weights are [N]."""
        made = self._head(rows, labels, loss_weights)
        assert isinstance(made, MlmOutput)
        return made
