"""The classes for transformers: what `from_pretrained(EXPORT, trust_remote_code=True)` loads.

This is the only file that imports transformers. Every model here holds the plain `ShareBert` under the names of an
export, so that its `state_dict` and an export are the same. Arguments are those of transformers' BERT, in its order;
`inputs_embeds` are rows of E [B, T, F], as `get_input_embeddings()` returns them.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import MODEL_TYPE, ShareBertConfig, ShareBertError
from .encoder import Encoded, Layer, ShareBert
from .heads import MlmHead
from .packed import unpack_all
from .plain_modules import embedding_matrix
from .roles import ZERO_BIAS, Normal, Uniform, own_roles, set_roles, weight_role
from .sparse import expand_sparse
from .stored import full_tensors

if TYPE_CHECKING:  # transformers before 5.10 copies only the files that this one names
    from .init import initialize  # noqa: F401
    from .kept import KeptMatrices  # noqa: F401
    from .kernels import linear_gelu  # noqa: F401
    from .kernels_cpu import Dropout  # noqa: F401
    from .kernels_flex import attention_within  # noqa: F401
    from .kernels_triton_gelu import FusedBiasGelu  # noqa: F401
    from .kernels_triton_loss import chunk_cross_entropy  # noqa: F401
    from .kernels_triton_norm import FusedAddDropoutNorm  # noqa: F401
    from .kernels_triton_slab import cut_slab  # noqa: F401
    from .precision import compute_dtype  # noqa: F401
    from .shared_linear import linear  # noqa: F401
    from .sharing import Sharing  # noqa: F401
    from .slices import slices_of  # noqa: F401
    from .tracing import is_traced  # noqa: F401
    from .virtual import generate  # noqa: F401

try:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import (
        BaseModelOutputWithPooling,
        MaskedLMOutput,
        MultipleChoiceModelOutput,
        QuestionAnsweringModelOutput,
        SequenceClassifierOutput,
        TokenClassifierOutput,
    )
    from transformers.utils import cached_file
except ImportError as error:
    raise ImportError(
        "ShareBERT for transformers needs its version 4.48 or newer: pip install 'transformers>=5'"
    ) from error
try:
    from transformers import PreTrainedConfig
    from transformers import initialization as init  # leaves what a checkpoint holds as it is

    BEFORE_5 = False
except ImportError:
    BEFORE_5 = True
    from torch.nn import init  # type: ignore[no-redef]
    from transformers import PretrainedConfig as PreTrainedConfig
try:
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError:  # before 4.53

    class GradientCheckpointingLayer(nn.Module):  # type: ignore[no-redef]
        """A layer whose call is checkpointed while `gradient_checkpointing` is true."""

        gradient_checkpointing = False
        _gradient_checkpointing_func: Any = None

        def __call__(self, *given: Any) -> Any:
            """The output of `forward`."""
            if self.gradient_checkpointing and self.training:
                return self._gradient_checkpointing_func(super().__call__, *given)
            return super().__call__(*given)


POOLINGS = ("pooler", "mean")

STORAGE_KEYS = {"packing", "sparse", "trimmed", "trimmed_pooler"}
"""Keys of `config.json` that say how an export stores its tensors."""

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of `from_pretrained` that say where files come from."""

OF_DECODERS = ("past_key_values", "encoder_hidden_states")
"""Arguments that would change what a model computes, and that an encoder does not have. Others are ignored."""

HEADS = {
    "mlm": r"^mlm_head\.",
    "classifier": r"^classifier\.",
    "qa": r"^qa_outputs\.",
}
"""Names of the tensors of each head. A model without that head ignores them in a checkpoint."""


class ShareBertHubConfig(PreTrainedConfig):
    """The keys of `ShareBertConfig`, for transformers.

    `classifier_pooling` says what a classifier of whole texts reads: `pooler`, the pooled output, as the authors do,
    or `mean`, the mean of the hidden states that are not padding.
    """

    model_type = MODEL_TYPE

    def __init__(self, *, classifier_pooling: str = "pooler", **values: Any) -> None:
        if classifier_pooling not in POOLINGS:
            raise ShareBertError(
                f"classifier_pooling: must be one of {', '.join(POOLINGS)} (got {classifier_pooling!r})"
            )
        model = ShareBertConfig(**{f.name: values.pop(f.name) for f in fields(ShareBertConfig) if f.name in values})
        super().__init__(**values)
        self.classifier_pooling = classifier_pooling
        for field in fields(model):
            setattr(self, field.name, getattr(model, field.name))

    def plain(self) -> ShareBertConfig:
        """The config of the model itself."""
        return ShareBertConfig(**{field.name: getattr(self, field.name) for field in fields(ShareBertConfig)})


class HubLayer(GradientCheckpointingLayer, Layer):  # type: ignore[misc]
    """A layer that transformers can tell to compute its values again in the backward pass."""


class HubEncoder(ShareBert):
    """`ShareBert` with layers of that kind."""

    layer_class = HubLayer


class ShareBertPreTrainedModel(PreTrainedModel):
    """What all models of this file have in common: loading, saving, starting, and the encoder."""

    config_class = ShareBertHubConfig
    base_model_prefix = "sharebert"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["HubEncoder"]  # noqa: RUF012 – its layers share their matrices

    def __init__(self, config: ShareBertHubConfig, *, pools: bool, has_mlm_head: bool = False) -> None:
        """`pools`: whether the model uses the pooled output."""
        if not has_mlm_head and config.mlm_head != "none":  # so that the config of a copy is true
            config = copy.deepcopy(config)
            config.mlm_head = "none"
        if STORAGE_KEYS & vars(config).keys():  # they are about a file; this model stores all tensors as they are
            config = copy.deepcopy(config)
            for name in STORAGE_KEYS & vars(config).keys():
                delattr(config, name)
        super().__init__(config)
        self.sharebert = HubEncoder(config.plain())
        if not pools:  # no gradient would ever reach it, which DistributedDataParallel takes for an error
            bias = self.sharebert.pooler_bias.data
            del self.sharebert.pooler_bias
            self.sharebert.register_buffer("pooler_bias", bias)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *given: Any, config: Any = None, **options: Any
    ) -> Any:
        """As in transformers; an export that does not store all tensors as they are is completed first."""
        place = pretrained_model_name_or_path
        hub = {name: options[name] for name in HUB_OPTIONS if name in options}
        stored_as = config
        if place is not None and not isinstance(config, cls.config_class):
            stored_as = cls.config_class.from_pretrained(place if config is None else config, **hub)
        packing = getattr(stored_as, "packing", None)
        sparse = getattr(stored_as, "sparse", None)
        as_it_is = not (packing or sparse or getattr(stored_as, "trimmed", False))
        if place is None or "state_dict" in options or as_it_is:
            return super().from_pretrained(place, *given, config=config, **options)
        changes = {name: options.pop(name) for name in list(options) if _is_a_key(stored_as, name)}
        if changes:  # keys of the config among the arguments, such as num_labels
            stored_as = cls.config_class.from_pretrained(place, **hub, **changes)
        config = copy.deepcopy(stored_as)
        config.name_or_path = str(place)
        for name in STORAGE_KEYS & vars(config).keys():  # a copy that is saved from here stores all, as numbers
            delattr(config, name)
        stored = _stored(place, hub)
        if sparse:
            stored = expand_sparse(sparse, stored)
        if packing:
            stored = unpack_all(packing, stored)
        for name in ("subfolder", "variant"):
            options.pop(name, None)
        shapes = {name: tensor.shape for name, tensor in _on_meta(cls, config).items()}
        options["state_dict"] = full_tensors(shapes, stored)
        return super().from_pretrained(None, *given, config=config, **options)

    @property
    def base_model(self) -> nn.Module:
        """The encoder as a `ShareBertModel`, which shares this model's parameters."""
        if isinstance(self, ShareBertModel):
            return self
        config: Any = self.config
        with torch.device("meta"):
            model = ShareBertModel(copy.deepcopy(config))
        model.config, model.sharebert = config, self.sharebert
        return model.train(self.training)

    def get_input_embeddings(self) -> nn.Module:
        """E [V, F]: the input embedding, from which the matrices of all layers are made too."""
        return self.sharebert.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace E, and with it the matrices of all layers. The next forward pass refuses another shape."""
        module: Any = value
        self.sharebert.word_embeddings = set_roles(module, **own_roles(self.sharebert.word_embeddings))

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """The input embedding, if the size stays; rounded up to `vocab_pad_multiple`, as the config does it.

        Raises ShareBertError for another size: the layers are cut from the embedding, so it would be another model.
        """
        words = self.config.vocab_size
        multiples = (pad_to_multiple_of or 1, self.config.vocab_pad_multiple)
        wanted = words if new_num_tokens is None else new_num_tokens
        if any(-(-wanted // multiple) * multiple == words for multiple in (*multiples, 1)):
            return self.sharebert.word_embeddings
        raise ShareBertError(
            f"resize_token_embeddings: the layers' weights are cut from the embedding; its size is fixed at {words} "
            f"(asked for {new_num_tokens})"
        )

    if BEFORE_5:

        def tie_weights(self) -> None:  # type: ignore[override]
            """Ties nothing. Transformers before 5 would replace the decoder of an untied head by E."""

    def encode(
        self,
        pool: bool,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        head_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        further: dict[str, Any],
    ) -> Encoded:
        """The encoder's output for the arguments of `forward`; `states` only if they are asked for."""
        for name in OF_DECODERS:
            if further.get(name) is not None:
                raise ShareBertError(
                    f"{name}: not supported; it is for decoders (prefix tuning needs it, LoRA does not)"
                )
        if input_ids is None and inputs_embeds is None:
            raise ShareBertError("input_ids: required (or inputs_embeds)")
        if input_ids is not None and inputs_embeds is not None:
            raise ShareBertError("input_ids and inputs_embeds: give one of them, not both")
        if inputs_embeds is not None and inputs_embeds.shape[-1] != self.config.factor_size:
            raise ShareBertError(
                f"inputs_embeds: must be [B, T, {self.config.factor_size}], rows of the input embedding "
                f"(got {list(inputs_embeds.shape)})"
            )
        words: Any = self.sharebert.word_embeddings
        size = getattr(words, "num_embeddings", self.config.vocab_size), getattr(words, "embedding_dim", None)
        if size not in ((self.config.vocab_size, width) for width in (self.config.factor_size, None)):
            raise ShareBertError(
                "the layers' weights are cut from the input embedding, so it must be "
                f"{[self.config.vocab_size, self.config.factor_size]} (it is {list(size)})"
            )
        if _flag(output_attentions, self.config, "output_attentions"):
            raise ShareBertError("output_attentions: not supported; the attention probabilities are never made")
        encoded: Encoded = self.sharebert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids=position_ids,
            factors=inputs_embeds,
            head_mask=head_mask,
            pool=pool,
            keep_states=_flag(output_hidden_states, self.config, "output_hidden_states"),
        )
        return encoded

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **options: Any) -> None:
        """Reentrant checkpoints would lose the gradients of the matrices that all layers share."""
        options["gradient_checkpointing_func"] = functools.partial(checkpoint, use_reentrant=False)
        super()._set_gradient_checkpointing(enable=enable, **options)

    def finish(self, output: Any, return_dict: bool | None) -> Any:
        """`output`, or a tuple of what it holds, as the argument or the config says."""
        as_dict = _flag(return_dict, self.config, "return_dict")
        return output if as_dict and not getattr(self.config, "torchscript", False) else output.to_tuple()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start the parameters that no checkpoint holds, as `initialize` does with `init: variance`."""
        roles = own_roles(module)
        if not roles:
            super()._init_weights(module)
        for name, role in roles.items():
            parameter = getattr(module, name)
            start = role.start.variance
            if isinstance(start, Normal):
                init.normal_(parameter, std=start.std)
            elif isinstance(start, Uniform):
                init.uniform_(parameter, -start.bound, start.bound)
            else:
                init.constant_(parameter, start.value)

    def _classifier(self, labels: int) -> nn.Linear:
        """A linear layer from hidden states to scores, that starts as the model's weights do."""
        layer = nn.Linear(self.config.hidden_size, labels)
        return set_roles(layer, weight=weight_role(self.config.initializer_range), bias=ZERO_BIAS)


def _is_a_key(config: ShareBertHubConfig, name: str) -> bool:
    """Whether an argument of `from_pretrained` changes the config, and is no argument of the loading itself."""
    return hasattr(config, name) and name not in (*HUB_OPTIONS, "dtype", "torch_dtype", "attn_implementation")


def _stored(place: Any, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors in the safetensors files of a folder, or of a repository on the hub."""
    from safetensors.torch import load_file

    files = ["model.safetensors"]
    index = cached_file(place, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **hub)
    if index is not None:
        with open(index, encoding="utf-8") as lines:  # noqa: PTH123
            files = sorted(set(json.load(lines)["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for file in files:
        path = cached_file(place, file, **hub)
        assert path is not None
        tensors.update(load_file(path))
    return tensors


def _on_meta(cls: Any, config: ShareBertHubConfig) -> dict[str, Tensor]:
    """The tensors of a model of this class, without values."""
    with torch.device("meta"):
        return dict(cls(config).state_dict())


class ShareBertModel(ShareBertPreTrainedModel):
    """The encoder. `pooler_output` is x·W + b of the first position that is not padding, without an activation."""

    _keys_to_ignore_on_load_unexpected = [*HEADS.values()]  # noqa: RUF012

    def __init__(self, config: ShareBertHubConfig) -> None:
        super().__init__(config, pools=True)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **further: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Hidden states [B, T, H] and pooled output [B, H] of [B, T] ids."""
        encoded = self.encode(
            True,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            further,
        )
        output = BaseModelOutputWithPooling(
            last_hidden_state=encoded.hidden, pooler_output=encoded.pooled, hidden_states=encoded.states
        )
        return self.finish(output, return_dict)


class ShareBertForMaskedLM(ShareBertPreTrainedModel):
    """Encoder and MLM head. The loss is the mean over the labels that are not -100."""

    _keys_to_ignore_on_load_unexpected = [HEADS["classifier"], HEADS["qa"]]  # noqa: RUF012

    def __init__(self, config: ShareBertHubConfig) -> None:
        if config.mlm_head == "none":
            raise ShareBertError("this model has no MLM head (mlm_head: none); load it with AutoModel")
        super().__init__(config, pools=False, has_mlm_head=True)
        self.mlm_head = MlmHead(config.plain())
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        """The decoder of an untied head; a tied one has none of its own."""
        return None if self.mlm_head.tied else self.mlm_head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the decoder of an untied head. Raises ShareBertError for a tied head, or another shape."""
        if self.mlm_head.tied:
            raise ShareBertError("set_output_embeddings: a tied MLM head has no decoder; it scores words by E")
        shape, ours = tuple(value.weight.shape), tuple(self.mlm_head.decoder.weight.shape)
        if shape != ours:
            raise ShareBertError(f"set_output_embeddings: must be {list(ours)} (got {list(shape)})")
        self.mlm_head.decoder = set_roles(value, **own_roles(self.mlm_head.decoder))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **further: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits [B, T, V] of [B, T] ids, and the loss if labels [B, T] are given."""
        encoded = self.encode(
            False,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            further,
        )
        words = self.sharebert.word_embeddings
        embedding = embedding_matrix(words, self.config.vocab_size) if self.mlm_head.tied else None
        logits = self.mlm_head(encoded.hidden, embedding, expansion=self.sharebert.factor_expansion)
        loss = None
        if labels is not None:
            loss = _mean(F.cross_entropy, logits.flatten(0, 1).float(), labels.flatten(), num_items_in_batch)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.states)
        return self.finish(output, return_dict)


class ShareBertForSequenceClassification(ShareBertPreTrainedModel):
    """Encoder, dropout and one linear layer on the pooled output, as the authors fine-tune; or on a mean."""

    _keys_to_ignore_on_load_unexpected = [HEADS["mlm"], HEADS["qa"]]  # noqa: RUF012

    def __init__(self, config: ShareBertHubConfig) -> None:
        super().__init__(config, pools=config.classifier_pooling == "pooler")
        self.num_labels: int = config.num_labels or 0
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = self._classifier(self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **further: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Scores [B, labels], and the loss that `config.problem_type` or, where it is None, the labels ask for."""
        encoded = self.encode(
            self.config.classifier_pooling == "pooler",
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            further,
        )
        logits = self.classifier(self.dropout(_text(encoded, attention_mask)))
        loss = None if labels is None else self._loss(logits.float(), labels, num_items_in_batch)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.states)
        return self.finish(output, return_dict)

    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        config: Any = self.config
        if config.problem_type is None:
            config.problem_type = problem_type(labels, self.num_labels)
        kind = config.problem_type
        if kind == "multi_label_classification":
            return _mean(F.binary_cross_entropy_with_logits, logits, labels.float(), items)
        if kind == "regression":
            return _mean(F.mse_loss, logits.view_as(labels), labels.float(), items)
        if labels.is_floating_point():
            raise ShareBertError(
                f"labels: numbers with a fraction, but the model's problem_type is '{kind}'; set problem_type to "
                "'multi_label_classification' or 'regression'"
            )
        return _mean(F.cross_entropy, logits, labels.view(-1), items)


class ShareBertForTokenClassification(ShareBertPreTrainedModel):
    """Encoder, dropout and one linear layer on each hidden state. Labels of -100 do not count."""

    _keys_to_ignore_on_load_unexpected = [HEADS["mlm"], HEADS["qa"]]  # noqa: RUF012

    def __init__(self, config: ShareBertHubConfig) -> None:
        super().__init__(config, pools=False)
        self.num_labels: int = config.num_labels or 0
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = self._classifier(self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **further: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """Scores [B, T, labels], and the loss if labels [B, T] are given."""
        encoded = self.encode(
            False,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            further,
        )
        logits = self.classifier(self.dropout(encoded.hidden))
        loss = None
        if labels is not None:
            loss = _mean(F.cross_entropy, logits.flatten(0, 1).float(), labels.flatten(), num_items_in_batch)
        output = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.states)
        return self.finish(output, return_dict)


class ShareBertForQuestionAnswering(ShareBertPreTrainedModel):
    """Encoder and one linear layer that scores each position as the start and as the end of an answer."""

    _keys_to_ignore_on_load_unexpected = [HEADS["mlm"], HEADS["classifier"]]  # noqa: RUF012

    def __init__(self, config: ShareBertHubConfig) -> None:
        super().__init__(config, pools=False)
        self.qa_outputs = self._classifier(2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **further: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """Start and end scores [B, T], and the mean of their two losses if both positions [B] are given.

        A position outside the row (an answer that was cut off) does not count.
        """
        encoded = self.encode(
            False,
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions,
            output_hidden_states,
            further,
        )
        start, end = self.qa_outputs(encoded.hidden).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            outside = start.shape[1]
            losses = [
                F.cross_entropy(scores.float(), places.view(-1).clamp(0, outside), ignore_index=outside)
                for scores, places in ((start, start_positions), (end, end_positions))
            ]
            loss = (losses[0] + losses[1]) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start.contiguous(), end_logits=end.contiguous(), hidden_states=encoded.states
        )
        return self.finish(output, return_dict)


class ShareBertForMultipleChoice(ShareBertPreTrainedModel):
    """Encoder, dropout and one linear layer that scores each choice by its text, pooled as a classifier does."""

    _keys_to_ignore_on_load_unexpected = [HEADS["mlm"], HEADS["qa"]]  # noqa: RUF012

    def __init__(self, config: ShareBertHubConfig) -> None:
        super().__init__(config, pools=config.classifier_pooling == "pooler")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = self._classifier(1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **further: Any,
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """Scores [B, choices] of [B, choices, T] ids, and the loss if labels [B] are given.

        `position_ids` are [B, choices, T], [1, T] or [T].
        """
        first, axes = (input_ids, 3) if input_ids is not None else (inputs_embeds, 4)
        if first is not None and first.dim() != axes:
            raise ShareBertError(
                "multiple choice: needs [B, choices, T] ids, or inputs_embeds with one axis more "
                f"(got {list(first.shape)})"
            )
        choices = 0 if first is None else first.shape[1]
        mask = _flat(attention_mask)
        encoded = self.encode(
            self.config.classifier_pooling == "pooler",
            _flat(input_ids),
            mask,
            _flat(token_type_ids),
            position_ids if position_ids is None or position_ids.dim() < 3 else _flat(position_ids),
            head_mask,
            _flat(inputs_embeds),
            output_attentions,
            output_hidden_states,
            further,
        )
        logits = self.classifier(self.dropout(_text(encoded, mask))).view(-1, choices)
        loss = None
        if labels is not None:
            loss = _mean(F.cross_entropy, logits.float(), labels.view(-1), num_items_in_batch)
        output = MultipleChoiceModelOutput(loss=loss, logits=logits, hidden_states=encoded.states)
        return self.finish(output, return_dict)


def problem_type(labels: Tensor, num_labels: int) -> str:
    """The kind of classification that labels ask for, as transformers' BERT decides it."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def masked_mean(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mean [B, H] of hidden states [B, T, H] at the positions where the mask [B, T] is not 0.

    Raises ShareBertError for a mask of another shape: it does not say which positions are padding.
    """
    if attention_mask is None:
        return hidden.mean(1)
    if attention_mask.dim() != 2:
        raise ShareBertError(
            f"classifier_pooling: mean needs an attention_mask [B, T] (got {list(attention_mask.shape)})"
        )
    kept = (attention_mask != 0).unsqueeze(-1).to(hidden.dtype)
    return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)


def _text(encoded: Encoded, attention_mask: Tensor | None) -> Tensor:
    """One vector [B, H] for each text: the pooled output where it was made, else the mean."""
    return masked_mean(encoded.hidden, attention_mask) if encoded.pooled is None else encoded.pooled


def _mean(loss: Any, outputs: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    """The mean loss; with `items`, the sum over their number, as a trainer that accumulates gradients wants it."""
    if items is None:
        return loss(outputs, labels)  # type: ignore[no-any-return]
    return loss(outputs, labels, reduction="sum") / items  # type: ignore[no-any-return]


def _flat(x: Tensor | None) -> Tensor | None:
    """[B, choices, …] → [B · choices, …]."""
    return None if x is None else x.flatten(0, 1)


def _flag(given: bool | None, config: Any, key: str) -> bool:
    """An argument of `forward`, or what the config says where the argument is None."""
    return bool(getattr(config, key, False) if given is None else given)
