"""The encoder: pre-LN transformer layers that own biases and norms; their matrices are given to them."""

from __future__ import annotations

from math import sqrt
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import ShareBertConfig, ShareBertError
from .kernels import add_dropout_norm, attention, document_mask, linear_gelu
from .roles import (
    FACTOR_NORM_WEIGHT,
    LAYER_BIAS,
    NORM_WEIGHT,
    ZERO_BIAS,
    Constant,
    Normal,
    Role,
    Start,
    set_roles,
    weight_role,
)
from .shared_linear import linear, linears
from .sharing import LayerWeights, OneGeneratedSet, Sharing, Weights, sharing_of


class Encoded(NamedTuple):
    """The encoder's output for a batch."""

    hidden: Tensor
    """[B, T, H], after the final LayerNorm."""
    pooled: Tensor | None
    """[B, H], from the first position that is not padding, without activation; None if it was not asked for."""
    states: tuple[Tensor, ...] | None = None
    """The residual stream [B, T, H] before each layer, and `hidden`; None if they were not asked for."""


class AddDropoutNorm(nn.LayerNorm):
    """Adds a block's output to the residual stream, with dropout, and normalises the sum."""

    def __init__(self, config: ShareBertConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)
        set_roles(self, weight=NORM_WEIGHT, bias=ZERO_BIAS)
        self.dropout = config.hidden_dropout_prob

    def forward(self, stream: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The new stream [B, T, H] and its LayerNorm [B, T, H]."""
        dropout = self.dropout if self.training else 0.0
        return add_dropout_norm(stream, branch, self.weight, self.bias, self.eps, dropout)


class Layer(nn.Module):
    """Attention and feed-forward, each after a LayerNorm. The layer's matrices are given to `forward`.

    A layer takes the residual stream and the branch that is not yet added to it, and returns the same two. So one
    operation does every addition and the LayerNorm that follows it.
    """

    def __init__(self, config: ShareBertConfig) -> None:
        super().__init__()
        hidden, attended = config.hidden_size, config.attention_size
        self.heads = config.heads
        self.scale = config.score_scale
        self.attention_dropout = config.attention_probs_dropout_prob
        self.attention_norm = AddDropoutNorm(config)
        self.query_bias = nn.Parameter(torch.zeros(attended))
        self.key_bias = nn.Parameter(torch.zeros(attended))
        self.value_bias = nn.Parameter(torch.zeros(attended))
        self.attention_output_bias = nn.Parameter(torch.zeros(hidden))
        self.ffn_norm = AddDropoutNorm(config)
        self.intermediate_bias = nn.Parameter(torch.zeros(config.inner_size))
        self.output_bias = nn.Parameter(torch.zeros(hidden))
        set_roles(self, **{name: LAYER_BIAS for name, _ in self.named_parameters(recurse=False)})
        self.branch_gain = config.branch_gain
        self.branch_gains: nn.Parameter | None = None
        if config.branch_gain is not None and config.learned_branch_gains:
            self.branch_gains = nn.Parameter(torch.ones(2))
            start = Constant(config.branch_gain)
            set_roles(self, branch_gains=Role(False, Start(start, start)))

    def forward(
        self, stream: Tensor, branch: Tensor | None, weights: Weights, mask: Any, head_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Stream and branch [B, T, H] → the same two after this layer.

        `mask` is as in `kernels.attention`; `head_mask` [heads] is a factor on each head's probabilities.
        """
        stream, x = self.attention_norm(stream, branch)
        attended = attention(
            *self.project(x, weights),
            mask,
            self.scale,
            self.attention_dropout if self.training else 0.0,
        )
        if head_mask is not None:
            attended = attended * head_mask.to(attended.dtype)[:, None, None]
        branch = linear(attended.transpose(1, 2).flatten(2), weights.attention_output, self.attention_output_bias)
        stream, x = self.ffn_norm(stream, self.gained(branch, 0))
        inner = linear_gelu(x, weights.intermediate, self.intermediate_bias)
        return stream, self.gained(linear(inner, weights.output, self.output_bias), 1)

    def gained(self, branch: Tensor, number: int) -> Tensor:
        """What branch 0 (attention) or 1 (feed-forward) adds to the stream: times its gain, where there is one."""
        gain = self.gain(number)
        return branch if gain is None else branch * gain

    def gain(self, number: int) -> Tensor | float | None:
        """The factor on branch 0 or 1: learned (a scalar), constant, or none."""
        return self.branch_gain if self.branch_gains is None else self.branch_gains[number]

    def project(self, x: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, T, d] of x [B, T, H]."""
        query, key, value = linears(
            x, (weights.query, weights.key, weights.value), (self.query_bias, self.key_bias, self.value_bias)
        )
        return self._heads(query), self._heads(key), self._heads(value)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H] → [B, heads, T, d], a view."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ShareBert(nn.Module):
    """The encoder of Hu et al. (AAAI 2024), with VEPS or EPS; equations in `virtual`."""

    layer_class: type[Layer] = Layer

    def __init__(self, config: ShareBertConfig) -> None:
        super().__init__()
        self.config = config
        self.sharing: Sharing = sharing_of(config)
        hidden, factor, weight = config.hidden_size, config.factor_size, weight_role(config.initializer_range)
        row = config.row_size
        self.word_embeddings = set_roles(nn.Embedding(config.vocab_size, factor), weight=weight)
        if config.sharing != "eps":
            self.pre_factor_norm = _factor_norm(row, config)
            self.factor_linear = set_roles(nn.Linear(row, hidden), weight=weight, bias=ZERO_BIAS)
        self.factor_expansion = None
        if config.expanded_size is not None:
            self.factor_expansion = set_roles(nn.Linear(factor, row, bias=False), weight=weight)
        if config.sharing == "veps":
            # E has standard deviation `initializer_range`; with W_all N(0, 1/F) the matrices have the same.
            start = weight.start._replace(variance=Normal(1 / sqrt(factor)))
            self.factor_linear_all = set_roles(
                nn.Linear(factor, hidden), weight=weight._replace(start=start, generates=True), bias=ZERO_BIAS
            )
        elif config.sharing == "eps":
            set_roles(self.word_embeddings, weight=weight._replace(generates=True))
        kept_heads = config.kept_heads if config.generates else None
        self.kept_attention_scale = _kept_scale(self, kept_heads, config.attention_size)
        self.kept_inner_scale = _kept_scale(self, config.kept_columns, config.inner_size)
        self.pos_factor_norm = _factor_norm(hidden, config)
        self.position_embeddings = set_roles(nn.Embedding(config.max_position_embeddings, hidden), weight=weight)
        self.token_type_embeddings = set_roles(nn.Embedding(config.type_vocab_size, hidden), weight=weight)
        self.layers = nn.ModuleList(self.layer_class(config) for _ in range(config.num_hidden_layers))
        self.final_norm = AddDropoutNorm(config)
        self.pooler_bias = nn.Parameter(torch.zeros(hidden))
        set_roles(self, pooler_bias=LAYER_BIAS)
        scales = {name: getattr(self, name) for name in ("kept_attention_scale", "kept_inner_scale")}
        set_roles(self, **{name: NORM_WEIGHT for name, scale in scales.items() if scale is not None})
        self.recompute = False
        """Whether the backward pass computes each layer again, so that only the layer's input is kept."""

    def forward(
        self,
        tokens: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        factors: Tensor | None = None,
        head_mask: Tensor | None = None,
        pool: bool = True,
        keep_states: bool = False,
    ) -> Encoded:
        """Encode a batch of rows.

        Args:
            tokens: [B, T], int32 or int64 ids, T at most `max_position_embeddings`.
            attention_mask: [B, T], 0 at padding; or a mask of pairs, as in `visible`; None if there is no padding.
            token_type_ids: [B, T], int32 or int64; None for type 0 everywhere.
            document_ids: [B, T], the number of each position's document. With it, a position sees only its own
                document.
            position_ids: [B, T], [1, T] or [T]; None for 0 to T - 1.
            factors: [B, T, F], in place of `tokens` (then None): rows of E, or others like them.
            head_mask: [heads] or [L, heads], a factor on each head's attention probabilities.
            pool: make the pooled output too (it costs one more generated matrix).
            keep_states: return the residual stream before each layer too.

        Raises ShareBertError if rows have no tokens, or are longer than the model's positions.
        """
        given = tokens if factors is None else factors
        if given is None:
            raise ShareBertError("no tokens were given")
        self._check_length(given.shape[1], position_ids)
        weights = self.layer_weights(pool)
        factors = self.word_embeddings(tokens) if factors is None else factors
        stream, branch = self._embed(factors, token_type_ids, position_ids), None
        mask = visible(attention_mask, document_ids)
        states: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            if keep_states:
                if branch is not None:  # add it here, so that the state is part of the graph
                    dropout = self.config.hidden_dropout_prob
                    stream, branch = stream + F.dropout(branch, dropout, self.training), None
                states.append(stream)
            scale = head_mask if head_mask is None or head_mask.dim() == 1 else head_mask[index]
            inputs = stream, branch, weights.of_layer(index), mask, scale
            if self.recompute and torch.is_grad_enabled():
                stream, branch = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                stream, branch = layer(*inputs)
        _, hidden = self.final_norm(stream, branch)
        pooled = None
        if weights.pooler is not None:
            pooled = linear(_first(hidden, attention_mask), weights.pooler, self.pooler_bias)
        return Encoded(hidden, pooled, (*states, hidden) if keep_states else None)

    def layer_weights(self, pooler: bool = True) -> LayerWeights:
        """The matrices of all layers, and the pooler's if `pooler` is true."""
        return self.sharing(self, pooler)

    def forget_weights(self) -> None:
        """Drop the generated matrices that evaluation keeps; see `kept` for when a caller must do so."""
        if isinstance(self.sharing, OneGeneratedSet):
            self.sharing.kept.forget()

    def __setattr__(self, name: str, value: Any) -> None:
        # An adapter that is merged writes past the version counter, and then puts the module back in its place.
        if name in self.__dict__.get("_modules", ()):
            self.forget_weights()
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> ShareBert:
        """See `nn.Module.train`; training keeps no generated matrices."""
        if mode:
            self.forget_weights()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> ShareBert:  # every move and every change of dtype
        self.forget_weights()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_weights()
        super()._load_from_state_dict(*args, **kwargs)

    def embed_words(self, factors: Tensor) -> Tensor:
        """Rows of E [..., F] as they enter the residual stream, before position and type, [..., H]."""
        if self.factor_expansion is not None:
            factors = self.factor_expansion(factors)
        if self.config.sharing != "eps":
            factors = self.factor_linear(self.pre_factor_norm(factors))
        return self.pos_factor_norm(factors)  # type: ignore[no-any-return]

    def _check_length(self, length: int, position_ids: Tensor | None) -> None:
        if length == 0:
            raise ShareBertError("rows of 0 tokens: a row must hold one token at least")
        if position_ids is None and length > self.config.max_position_embeddings:
            raise ShareBertError(
                f"rows of {length} tokens, but the model has {self.config.max_position_embeddings} positions "
                "(max_position_embeddings): cut the text or split it"
            )

    def _embed(self, factors: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """The start of the residual stream, [B, T, H], from rows of E [B, T, F]."""
        words = self.embed_words(factors)
        if position_ids is None:
            position_ids = torch.arange(factors.shape[1], device=factors.device)
        if token_type_ids is None:
            token_type_ids = position_ids.new_zeros(1)
        positions, types = self.position_embeddings(position_ids), self.token_type_embeddings(token_type_ids)
        return F.dropout(words + positions + types, self.config.hidden_dropout_prob, self.training)


def _factor_norm(width: int, config: ShareBertConfig) -> nn.LayerNorm:
    """A LayerNorm of the input embedding."""
    return set_roles(nn.LayerNorm(width, eps=config.layer_norm_eps), weight=FACTOR_NORM_WEIGHT, bias=ZERO_BIAS)


def _kept_scale(encoder: ShareBert, kept: tuple[int, ...] | None, width: int) -> nn.Parameter | None:
    """Factors on the rows that a pruned model uses of a generated matrix, [width]; None where all rows are used."""
    return None if kept is None else nn.Parameter(torch.ones(width))


def _first(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The hidden state [B, H] of each row's first position; where a row starts with padding, the first after it."""
    if attention_mask is None or attention_mask.dim() != 2:
        return hidden[:, 0]
    first = (attention_mask != 0).int().argmax(1)
    return hidden.gather(1, first[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)


def visible(attention_mask: Tensor | None, document_ids: Tensor | None) -> Any:
    """The mask for `kernels.attention`; None if all positions see all positions.

    `attention_mask` is [B, T], 0 at padding; or [B, T, T] or [B, 1 or heads, T, T], 0 where a query (row) does not
    see a key (column). Floating numbers in four dimensions are added to the scores, as transformers does.

    A position that would see nothing (in a row that is all padding) sees everything instead: nobody uses its
    output, but NaN there would spoil the gradients.
    """
    if document_ids is not None:
        if attention_mask is not None:  # padding becomes one more document
            document_ids = torch.where(attention_mask.bool(), document_ids.to(torch.int32), -1)
        return document_mask(document_ids)
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4 and attention_mask.is_floating_point():
        return attention_mask
    if attention_mask.dim() not in (2, 3, 4):
        raise ShareBertError(f"attention_mask: [B, T], [B, T, T] or [B, 1, T, T] (got {list(attention_mask.shape)})")
    mask = attention_mask.bool()
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
    return mask | ~mask.any(-1, keepdim=True)
