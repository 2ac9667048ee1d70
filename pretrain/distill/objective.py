"""What a training step with a teacher calls."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.batches import MicroBatch
from pretrain.distill.teacher import Teacher
from pretrain.objective import LossSums, MaskedLanguageModelling, Model


@dataclass(frozen=True)
class Distillation:
    """All losses of `distill` while training; the masked-LM loss alone in validation, so that runs compare.

    A step divides sums by the masked tokens of all ranks together. Losses that are means over all positions, and not
    over masked ones, are therefore summed with the step's mask rate as the weight of a position, so that neither ranks
    nor micro-batches change the step.
    """

    mlm: MaskedLanguageModelling
    teacher: Teacher

    def __call__(self, model: Model, batch: MicroBatch) -> LossSums:
        if not torch.is_grad_enabled():
            return self.mlm(model, batch)
        batch = batch.to(self.mlm.device)
        taught = self.teacher(batch)
        ids = batch.document_ids
        visible = ids[:, :, None] == ids[:, None, :] if self.mlm.within_documents else (ids != 0)[:, None, :]
        hide_padding = batch.padded and not self.mlm.within_documents
        output = model(
            batch.tokens,
            attention_mask=ids if hide_padding else None,
            document_ids=ids if self.mlm.within_documents else None,
            positions=batch.positions,
            labels=batch.labels,
            loss_weights=batch.loss_weights,
            taught=taught,
            token_weights=batch.mask_rate * real_positions(batch),
            visible=visible.expand(-1, ids.shape[1], -1),
        )
        return LossSums(output.loss_sum, output.correct)


def real_positions(batch: MicroBatch) -> Tensor:
    """As `batch.tokens`, float32: 1, or 0 at padding and in rows that only fill up the shape of a micro-batch.

    Every row of the dataset has a chosen token, but not every piece of one.
    """
    pieces, length = batch.tokens.shape
    used = torch.zeros(pieces // batch.pieces, device=batch.tokens.device)
    used.index_add_(0, batch.positions // (length * batch.pieces), batch.loss_weights)
    return (used > 0).float().repeat_interleave(batch.pieces)[:, None] * (batch.document_ids != 0)
