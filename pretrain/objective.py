"""What turns a micro-batch into a loss.

An objective is called with the model and a micro-batch. The model is the engine while training and validating, and
may be a plain `ShareBertForMaskedLM`. What else an objective needs (a teacher, for instance) is its own: it stands
outside the engine, so ZeRO does not split it, and outside the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pretrain.data.batches import MicroBatch

Model = Callable[..., Any]
"""Called as `ShareBertForMaskedLM.forward` is."""


class LossSums(NamedTuple):
    """Sums over the masked tokens of a micro-batch, fp32 scalars."""

    loss: Tensor
    """Of what is minimised; the step divides it by the masked tokens of the whole global batch."""
    correct: Tensor
    """Masked tokens whose likeliest word is the right one."""


class Objective(Protocol):
    """Maps a model and a micro-batch to the sums of its losses."""

    def __call__(self, model: Model, batch: MicroBatch) -> LossSums:
        """Every rank calls this equally often, because a forward pass is a collective under ZeRO 3."""


@dataclass(frozen=True)
class MaskedLanguageModelling:
    """Cross-entropy of the words at the masked positions (Devlin et al., NAACL 2019, section 3.1)."""

    device: torch.device
    """Where the model is."""
    within_documents: bool = False
    """A token attends to its own document only."""
    one_graph: bool = False
    """Pass an attention mask also where nothing is padded. Compiled layers would have two graphs otherwise."""

    def __call__(self, model: Model, batch: MicroBatch) -> LossSums:
        batch = batch.to(self.device)
        hide_padding = (batch.padded or self.one_graph) and not self.within_documents
        output = model(
            batch.tokens,
            attention_mask=batch.document_ids if hide_padding else None,
            document_ids=batch.document_ids if self.within_documents else None,
            positions=batch.positions,
            labels=batch.labels,
            loss_weights=batch.loss_weights,
        )
        return LossSums(output.loss_sum, output.correct)
