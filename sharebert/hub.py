"""The Hugging Face face of ShareBERT: what `from_pretrained(EXPORT, trust_remote_code=True)` loads.

The only file that imports transformers. Every model here holds the plain `ShareBert` under the export's own
names, so that their `state_dict` and an export are the same.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MODEL_TYPE, ShareBertConfig, ShareBertError
from .encoder import Encoded, ShareBert
from .heads import MlmHead
from .roles import Normal, Uniform, own_roles

try:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import initialization as init
    from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput
except ImportError as error:
    raise ImportError(
        "ShareBERT for transformers needs its version 5 or newer: pip install 'transformers>=5'"
    ) from error

POOLINGS = ("pooler", "mean")


class ShareBertHubConfig(PreTrainedConfig):
    """The keys of `ShareBertConfig`, as transformers wants them.

    `classifier_pooling` is what `ShareBertForSequenceClassification` reads: `pooler`, as the authors do, or
    `mean`, the mean of the hidden states that are not padding.
    """

    model_type = MODEL_TYPE

    def __init__(self, *, classifier_pooling: str = "pooler", **values: Any) -> None:
        if classifier_pooling not in POOLINGS:
            raise ShareBertError(f"classifier_pooling: one of {', '.join(POOLINGS)} (got {classifier_pooling!r})")
        model = ShareBertConfig(**{f.name: values.pop(f.name) for f in fields(ShareBertConfig) if f.name in values})
        super().__init__(**values)
        self.classifier_pooling = classifier_pooling
        for field in fields(model):
            setattr(self, field.name, getattr(model, field.name))

    def plain(self) -> ShareBertConfig:
        """The config of the model itself."""
        return ShareBertConfig(**{field.name: getattr(self, field.name) for field in fields(ShareBertConfig)})


class ShareBertPreTrainedModel(PreTrainedModel):
    """Loading, saving and starting, for all models of this file."""

    config_class = ShareBertHubConfig
    base_model_prefix = "sharebert"
    _supports_sdpa = True
    _no_split_modules = ["ShareBert"]  # noqa: RUF012 – its layers share their matrices

    def __init__(self, config: ShareBertHubConfig) -> None:
        super().__init__(config)
        self.sharebert = ShareBert(config.plain())

    def get_input_embeddings(self) -> nn.Module:
        """E: the input embedding, and what all layers are made of."""
        return self.sharebert.word_embeddings

    def resize_token_embeddings(self, *_: Any, **__: Any) -> nn.Embedding:
        """Raises ShareBertError: the layers are cut from the embedding, so that another size is another model."""
        raise ShareBertError(
            "resize_token_embeddings: the layers' weights are cut from the embedding; its size is fixed"
        )

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        pool: bool,
    ) -> tuple[Encoded, tuple[Tensor, ...] | None]:
        """The encoder's output and, where asked for, the residual stream before each layer and the final output."""
        if input_ids is None:
            raise ShareBertError("input_ids: required")
        if output_attentions:
            raise ShareBertError("output_attentions: not supported; the attention probabilities are never made")
        stream: list[Tensor] = []
        hooks = []
        if output_hidden_states:
            hooks = [layer.register_forward_pre_hook(_record(stream)) for layer in self.sharebert.layers]
        try:
            encoded = self.sharebert(input_ids, attention_mask, token_type_ids, pool=pool)
        finally:
            for hook in hooks:
                hook.remove()
        return encoded, (*stream, encoded.hidden) if output_hidden_states else None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start the parameters that no checkpoint holds, as `initialize` does with `init: variance`."""
        super()._init_weights(module)
        for name, role in own_roles(module).items():
            parameter = getattr(module, name)
            start = role.start.variance
            if isinstance(start, Normal):
                init.normal_(parameter, std=start.std)
            elif isinstance(start, Uniform):
                init.uniform_(parameter, -start.bound, start.bound)
            else:
                init.constant_(parameter, start.value)


class ShareBertModel(ShareBertPreTrainedModel):
    """The encoder. `pooler_output` is x·W + b of the first position, without an activation."""

    _keys_to_ignore_on_load_unexpected = [r"^mlm_head\.", r"^classifier\."]  # noqa: RUF012

    def __init__(self, config: ShareBertHubConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode [B, T] ids; `attention_mask` [B, T] is 0 at padding."""
        encoded, states = self.encode(
            input_ids, attention_mask, token_type_ids, output_attentions, output_hidden_states, pool=True
        )
        output = BaseModelOutputWithPooling(
            last_hidden_state=encoded.hidden, pooler_output=encoded.pooled, hidden_states=states
        )
        return output.to_tuple() if return_dict is False else output


class ShareBertForMaskedLM(ShareBertPreTrainedModel):
    """Encoder and MLM head. The loss is the mean over the labels that are not -100."""

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]  # noqa: RUF012

    def __init__(self, config: ShareBertHubConfig) -> None:
        super().__init__(config)
        if config.mlm_head == "none":
            raise ShareBertError("this model has no MLM head (mlm_head: none); load it with AutoModel")
        self.mlm_head = MlmHead(config.plain())
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        """The decoder of an untied head; a tied one has none of its own."""
        return None if self.mlm_head.tied else self.mlm_head.decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits [B, T, V] of [B, T] ids, and the loss where labels [B, T] are given."""
        encoded, states = self.encode(
            input_ids, attention_mask, token_type_ids, output_attentions, output_hidden_states, pool=False
        )
        embedding = self.sharebert.word_embeddings.weight if self.mlm_head.tied else None
        logits = self.mlm_head(encoded.hidden, embedding)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=states)
        return output.to_tuple() if return_dict is False else output


class ShareBertForSequenceClassification(ShareBertPreTrainedModel):
    """Encoder, dropout and one linear layer on the pooled output, as the authors fine-tune; or on a mean."""

    _keys_to_ignore_on_load_unexpected = [r"^mlm_head\."]  # noqa: RUF012

    def __init__(self, config: ShareBertHubConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Scores [B, labels]; the loss is squared error for one label (regression), cross-entropy for more."""
        by_mean = self.config.classifier_pooling == "mean"
        encoded, states = self.encode(
            input_ids, attention_mask, token_type_ids, output_attentions, output_hidden_states, pool=not by_mean
        )
        pooled = masked_mean(encoded.hidden, attention_mask) if by_mean else encoded.pooled
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else self._loss(logits.float(), labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states)
        return output.to_tuple() if return_dict is False else output

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.float())
        if self.config.problem_type == "regression" or self.num_labels == 1:
            return F.mse_loss(logits.squeeze(-1), labels.float().view_as(logits.squeeze(-1)))
        return F.cross_entropy(logits, labels.view(-1))


def masked_mean(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mean [B, H] of hidden states [B, T, H] where the mask [B, T] is not 0."""
    if attention_mask is None:
        return hidden.mean(1)
    kept = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)


def _record(stream: list[Tensor]) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        before, branch = inputs[:2]
        stream.append(before if branch is None else before + branch)

    return hook
