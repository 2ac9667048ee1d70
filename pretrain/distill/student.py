"""The model that is trained with a teacher. Its forward pass makes all losses: so ZeRO 3 gathers what they need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exports.distill_losses import (
    attention_kl_loss,
    attention_loss,
    cosine_loss,
    hidden_loss,
    logits_loss,
    relations_loss,
    scores_of,
    top_words_loss,
)
from pretrain.distill.recipe import DistillPlan
from pretrain.distill.recording import RecordingForMaskedLM
from pretrain.distill.teacher import TeacherOutput
from sharebert import MlmOutput, ShareBertConfig
from sharebert.roles import Constant, Role, Start, Uniform, set_roles

NOT_EXPORTED = "hidden_projection."
"""How the names of parameters begin that no export has."""


class DistilledForMaskedLM(RecordingForMaskedLM):
    """A student. It has one parameter more than the plain model where `distill.hidden` has a weight: the projection of
    its hidden states to the teacher's width, which exports leave out. `distill.project: false` has none."""

    def __init__(self, config: ShareBertConfig, plan: DistillPlan) -> None:
        super().__init__(config)
        self.plan = plan
        self.hidden_projection: nn.Linear | None = None
        if plan.recipe.hidden and plan.recipe.project:
            projection = nn.Linear(config.hidden_size, plan.width)
            uniform = Uniform(config.hidden_size**-0.5)
            bias = Start(Constant(0.0), Constant(0.0))
            self.hidden_projection = set_roles(
                projection, weight=Role(True, Start(uniform, uniform)), bias=Role(False, bias)
            )

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        taught: TeacherOutput | None = None,
        token_weights: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> MlmOutput:
        """The loss of `ShareBertForMaskedLM.forward`, or with `taught` the weighted sum of all losses.

        Args of the second kind:
            taught: the teacher's outputs for the same micro-batch.
            token_weights: [B, T], the weight of a position in the losses that are not of masked positions.
            visible: [B, T, T] booleans, which keys a query sees.
        """
        if taught is None:
            found = super().forward(
                tokens,
                attention_mask,
                token_type_ids,
                document_ids=document_ids,
                positions=positions,
                labels=labels,
                loss_weights=loss_weights,
            )
            self.sharebert.forget()
            return found
        assert token_weights is not None
        assert visible is not None
        recipe, layers = self.plan.recipe, self.plan.layers
        encoded = self.sharebert(
            tokens,
            attention_mask,
            token_type_ids,
            document_ids=document_ids,
            pool=False,
            keep_states=bool(recipe.hidden or recipe.cosine),
        )
        rows = encoded.hidden.flatten(0, 1).index_select(0, positions)
        if recipe.logits:
            assert taught.logits is not None
            scores = self.scores(rows)
            entropies = F.cross_entropy(scores.float(), labels, reduction="none")
            guessed = (scores.detach().argmax(-1) == labels).float()
            mlm = MlmOutput((loss_weights * entropies).sum(), (loss_weights * guessed).sum())
            words = self.plan.words
            if taught.words is None:
                soft = logits_loss(scores[:, :words], taught.logits[:, :words], loss_weights, recipe.temperature)
            else:
                assert taught.rest is not None
                kept = taught.logits, taught.words, taught.rest
                soft = top_words_loss(scores[:, :words], *kept, loss_weights, recipe.temperature)
            total = recipe.logits * soft
        else:
            mlm = self.mlm_loss(rows, labels, loss_weights)
            total = torch.zeros_like(mlm.loss_sum)
        total = total + recipe.mlm * mlm.loss_sum
        for ours, theirs in layers if recipe.hidden or recipe.cosine else ():
            state, wanted = encoded.states[ours], taught.states[theirs]
            if recipe.hidden:
                projected = state if self.hidden_projection is None else self.hidden_projection(state)
                total = total + recipe.hidden / len(layers) * hidden_loss(projected, wanted, token_weights)
            if recipe.cosine:
                total = total + recipe.cosine / len(layers) * cosine_loss(state, wanted, token_weights)
        if recipe.uses_projections:
            total = total + self._projection_losses(taught, token_weights, visible)
        self.sharebert.forget()
        return MlmOutput(total, mlm.correct)

    def _projection_losses(self, taught: TeacherOutput, token_weights: Tensor, visible: Tensor) -> Tensor:
        recipe, layers = self.plan.recipe, self.plan.layers
        total = token_weights.new_zeros(())
        projections = {ours: self.sharebert.take(ours) for ours in {ours for ours, _ in self.plan.projection_pairs}}
        pairs = self.plan.projection_pairs if recipe.attention or recipe.attention_kl else ()
        for ours, theirs in pairs:
            found = scores_of(projections[ours], self.config.score_scale)
            wanted = scores_of(taught.projections[theirs], taught.score_scale)
            seen = found, wanted, token_weights, visible
            if recipe.attention:
                total = total + recipe.attention / len(pairs) * attention_loss(*seen)
            if recipe.attention_kl:
                total = total + recipe.attention_kl / len(pairs) * attention_kl_loss(*seen)
        if recipe.relations:
            ours, theirs = layers[-1]
            total = total + recipe.relations * relations_loss(
                projections[ours], taught.projections[theirs], self.plan.relation_heads, token_weights, visible
            )
        return total
