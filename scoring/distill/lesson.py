"""The loss of one student in a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from exports.distill_losses import attention_loss, hidden_loss, logits_loss, without_embeddings
from scoring.distill.teacher import TaskTeacher
from scoring.distill.watch import AttentionScores
from scoring.encoders import Encoder


class Lesson(nn.Module):
    """What a student learns from its teacher. Its only parameters are the projection of the student's hidden states to
    the teacher's width, with a weight of `hidden`; they are trained and not kept.

    Args:
        teacher: the teacher.
        encoder: the student's encoder.
        model: the student, on its device.
    """

    def __init__(self, teacher: TaskTeacher, encoder: Encoder, model: nn.Module) -> None:
        super().__init__()
        recipe = self.recipe = teacher.recipe
        self.teacher = teacher
        self.pairs = teacher.pairs(encoder) if recipe.uses_layers else ()
        config = encoder.config
        self.projection = nn.Linear(config.hidden_size, teacher.width) if recipe.hidden else None
        self._scores = None
        if recipe.attention:
            self._scores = AttentionScores(
                model, [ours for ours, _ in without_embeddings(self.pairs)], str(encoder.folder)
            )
        self.arguments: dict[str, Any] = {"output_hidden_states": True} if recipe.hidden else {}
        """Further arguments of the student's forward pass."""

    def forward(self, output: Any, batch: dict[str, Tensor], rows: list[int]) -> Tensor:
        """The weighted sum of all losses, each a mean over the rows or the positions of the batch.

        Args:
            output: of the student's forward pass, with the loss of the labels.
            batch: what the student was given; no padding without an `attention_mask`.
            rows: the numbers of the train rows in it.
        """
        recipe, logits = self.recipe, output.logits.float()
        total: Tensor = recipe.labels * output.loss
        if recipe.logits:
            wanted = self.teacher.logits[rows].to(logits.device)
            if logits.shape[1] == 1:  # regression
                total = total + recipe.logits * (logits - wanted).square().mean()
            else:
                weights = torch.full((len(rows),), 1 / len(rows), device=logits.device)
                total = total + recipe.logits * logits_loss(logits, wanted, weights, recipe.temperature)
        return total + self._of_layers(output, batch, rows) if self.pairs else total

    def _of_layers(self, output: Any, batch: dict[str, Tensor], rows: list[int]) -> Tensor:
        recipe, attended = self.recipe, without_embeddings(self.pairs)
        taught = self.teacher.layer_outputs(rows, [theirs for _, theirs in self.pairs])
        mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
        weights = mask.float() / mask.sum()
        visible = mask.bool()[:, None, :].expand(-1, mask.shape[1], -1)
        scores = {} if self._scores is None else self._scores.take()
        total = weights.new_zeros(())
        for ours, theirs in self.pairs:
            if self.projection is not None:
                projected = self.projection(output.hidden_states[ours])
                total = total + recipe.hidden / len(self.pairs) * hidden_loss(projected, taught.states[theirs], weights)
            if scores and (ours, theirs) in attended:
                found = attention_loss(scores[ours], taught.scores[theirs], weights, visible)
                total = total + recipe.attention / len(attended) * found
        return total
