"""A teacher whose outputs come from a cache: micro-batches bring them, and no model is in memory."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.data.batches import MicroBatch
from pretrain.distill.recipe import DistillPlan
from pretrain.distill.teacher import TeacherOutput


@dataclass(frozen=True)
class CachedTeacher:
    """Maps a micro-batch with a cache's arrays beside its rows to the outputs that were computed for it."""

    plan: DistillPlan
    score_scale: float
    """Of the teacher: the factor on the products of queries and keys."""

    def __call__(self, batch: MicroBatch) -> TeacherOutput:
        """See `Teacher`. All numbers become fp32."""
        kept = batch.beside
        logits = words = rest = None
        if self.plan.recipe.logits:
            logits = kept["logits"].float().flatten(0, 1)
            if "words" in kept:
                words, rest = kept["words"].long().flatten(0, 1), kept["rest"].flatten(0, 1)
        projections = {}
        for layer in self.plan.projection_layers:
            query, key = kept[f"query-{layer}"].float(), kept[f"key-{layer}"].float()
            value = kept.get(f"value-{layer}")  # attention alone needs none
            projections[layer] = (query, key, query.new_empty(0) if value is None else value.float())
        states = {layer: kept[f"hidden-{layer}"].float() for layer in self.plan.state_layers}
        return TeacherOutput(logits, states, projections, self.score_scale, words, rest)
