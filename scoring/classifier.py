"""A fine-tuned encoder, and its predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from scoring.data import Texts
from scoring.encoders import Encoded, Encoder

PREDICT_BATCH = 128


@dataclass(frozen=True)
class Classifier:
    """A fine-tuned encoder."""

    encoder: Encoder
    model: nn.Module
    device: torch.device
    regression: bool
    trained: int | None = None
    """The number of parameters that LoRA trained; None: all were trained."""

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def nbytes(self) -> int:
        """The bytes of its parameters in memory."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def cpu(self) -> nn.Module:
        """Move the model to the CPU, and return it."""
        return self.model.to("cpu")

    def predict(self, texts: Texts) -> NDArray[Any]:
        """The labels as numbers [N], or values for regression."""
        return self.predict_encoded(self.encoder.encode(texts, "text"))

    def predict_encoded(self, encoded: Encoded) -> NDArray[Any]:
        """As `predict`, for rows that are tokenised already."""
        logits = self.logits(encoded)
        return logits[:, 0].astype(np.float64) if self.regression else logits.argmax(1)

    def logits(self, encoded: Encoded) -> NDArray[np.float32]:
        """The score of each label [N, labels]."""
        order = np.argsort(encoded.lengths(), kind="stable")
        self.model.eval()
        parts = []
        with torch.inference_mode():
            for start in range(0, len(order), PREDICT_BATCH):
                batch = self.encoder.collate(encoded, order[start : start + PREDICT_BATCH].tolist())
                logits = self.model(**{name: values.to(self.device) for name, values in batch.items()}).logits
                parts.append(logits.float().cpu().numpy())
        sorted_logits = np.concatenate(parts)
        logits = np.empty_like(sorted_logits)
        logits[order] = sorted_logits
        return logits
