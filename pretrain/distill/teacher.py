"""The teacher: frozen, in evaluation mode, outside the engine and outside checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from exports.bert_attention import keep_projections
from exports.distill_losses import Projections
from exports.hub_weights import load_hub_model
from exports.read import load_model
from pretrain.data.batches import MicroBatch
from pretrain.distill.recipe import DistillPlan, read_teacher_config
from pretrain.distill.recording import RecordingForMaskedLM
from sharebert_common.errors import BadInput


class TeacherOutput(NamedTuple):
    """What a teacher says of a micro-batch. Only what the recipe asks for is there."""

    logits: Tensor | None
    """[N, V] at the micro-batch's positions."""
    states: dict[int, Tensor]
    """The hidden states [B, T, H] after a layer, by its number from 1; of layer 0 the embeddings."""
    projections: dict[int, Projections]
    """Queries, keys and values of a layer, by its number from 1."""
    score_scale: float
    """The factor on the products of queries and keys."""
    words: Tensor | None = None
    """[N, K], where only the likeliest words were kept: the words of the columns of `logits` [N, K]."""
    rest: Tensor | None = None
    """[N], where only these were kept: log Σ exp(logit / T) over all other words."""


class Teacher(Protocol):
    """Maps a micro-batch, on the teacher's device, to its outputs."""

    def __call__(self, batch: MicroBatch) -> TeacherOutput: ...


def load_teacher(plan: DistillPlan, device: torch.device, *, within_documents: bool, precision: str) -> Teacher:
    """Load the teacher of `plan`.

    Raises BadInput: not readable, of a kind whose queries, keys and values are not found, or with `within_documents`
    one that joins neighbouring words before its layers, as MobileBERT does.
    """
    kind = ShareBertTeacher if read_teacher_config(plan.teacher).get("model_type") == "sharebert" else BertTeacher
    return kind(plan, device, within_documents, precision)


class _Frozen:
    """What both kinds share: the recipe's wishes, no gradients, and the precision of products."""

    def __init__(self, plan: DistillPlan, device: torch.device, within_documents: bool, precision: str) -> None:
        self.wants_logits = bool(plan.recipe.logits)
        self.states = plan.state_layers
        self.projections = plan.projection_layers
        self.within_documents = within_documents
        self.device = device
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> TeacherOutput:
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            return self.outputs(batch)

    def outputs(self, batch: MicroBatch) -> TeacherOutput:
        raise NotImplementedError


class ShareBertTeacher(_Frozen):
    """An export of this project."""

    def __init__(self, plan: DistillPlan, device: torch.device, within_documents: bool, precision: str) -> None:
        super().__init__(plan, device, within_documents, precision)
        loaded = load_model(plan.teacher)
        self.model = RecordingForMaskedLM(loaded.config)
        self.model.load_state_dict(loaded.state_dict())
        self.model.to(device).eval().requires_grad_(False)

    def outputs(self, batch: MicroBatch) -> TeacherOutput:
        """See `Teacher`."""
        model = self.model
        hide = None if self.within_documents or not batch.padded else batch.document_ids
        encoded = model.sharebert(
            batch.tokens,
            hide,
            document_ids=batch.document_ids if self.within_documents else None,
            pool=False,
            keep_states=bool(self.states),
        )
        states = encoded.states or ()
        projections = {layer: model.sharebert.take(layer) for layer in self.projections}
        model.sharebert.forget()
        rows = encoded.hidden.flatten(0, 1).index_select(0, batch.positions)
        logits = model.scores(rows) if self.wants_logits else None
        return TeacherOutput(
            logits, {layer: states[layer] for layer in self.states}, projections, model.config.score_scale
        )


class BertTeacher(_Frozen):
    """An encoder of transformers. Queries, keys and values are found in those that `keep_projections` names."""

    def __init__(self, plan: DistillPlan, device: torch.device, within_documents: bool, precision: str) -> None:
        super().__init__(plan, device, within_documents, precision)
        self.model = (
            _from_transformers(plan.teacher, masked_lm=self.wants_logits).to(device).eval().requires_grad_(False)
        )
        if within_documents and getattr(self.model.config, "trigram_input", False):
            raise BadInput(
                f"distill.teacher: {plan.teacher} joins each word with the words beside it (trigram_input), also those "
                "of another document; set data.within_documents=false"
            )
        self._seen: dict[tuple[int, str], Tensor] = {}
        self._scale = keep_projections(
            self.model, self.projections, ("query", "key", "value"), self._seen, f"distill: {plan.teacher}"
        )

    def outputs(self, batch: MicroBatch) -> TeacherOutput:
        """See `Teacher`."""
        ids = batch.document_ids
        pairs = (ids[:, :, None] == ids[:, None, :])[:, None]
        visible = ids != 0
        visible = visible | ~visible.any(1, keepdim=True)  # a piece of padding alone sees itself, and counts nothing
        mask = pairs if self.within_documents else visible.long()
        made = self.model(batch.tokens, attention_mask=mask, output_hidden_states=bool(self.states))
        logits = made.logits.flatten(0, 1).index_select(0, batch.positions) if self.wants_logits else None
        seen = self._seen
        projections = {
            layer: (seen[layer, "query"], seen[layer, "key"], seen[layer, "value"]) for layer in self.projections
        }
        self._seen.clear()
        return TeacherOutput(
            logits, {layer: made.hidden_states[layer] for layer in self.states}, projections, self._scale
        )


def _from_transformers(teacher: Path, *, masked_lm: bool) -> Any:
    try:
        from transformers import AutoModel, AutoModelForMaskedLM
    except ImportError as error:
        raise BadInput("distill.teacher: needs transformers: pip install 'sharebert[hf]'") from error
    try:
        if masked_lm:
            return load_hub_model(AutoModelForMaskedLM, teacher, new="nothing")[0]
        return load_hub_model(AutoModel, teacher, new="pooler")[0]
    except BadInput as error:
        raise BadInput(f"distill.teacher: {error}") from error
