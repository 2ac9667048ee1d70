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
from .roles import FACTOR_NORM_WEIGHT, LAYER_BIAS, NORM_WEIGHT, ZERO_BIAS, Normal, set_roles, weight_role
from .shared_linear import linear
from .sharing import LayerWeights, OneGeneratedSet, Sharing, Weights


class Encoded(NamedTuple):
    """The encoder's output for a batch."""

    hidden: Tensor
    """[B, T, H], after the final LayerNorm."""
    pooled: Tensor | None
    """[B, H], from the first position, without activation; None if it was not asked for."""


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
        hidden = config.hidden_size
        self.heads = config.num_attention_heads
        self.scale = config.score_scale
        self.attention_dropout = config.attention_probs_dropout_prob
        self.attention_norm = AddDropoutNorm(config)
        self.query_bias = nn.Parameter(torch.zeros(hidden))
        self.key_bias = nn.Parameter(torch.zeros(hidden))
        self.value_bias = nn.Parameter(torch.zeros(hidden))
        self.attention_output_bias = nn.Parameter(torch.zeros(hidden))
        self.ffn_norm = AddDropoutNorm(config)
        self.intermediate_bias = nn.Parameter(torch.zeros(config.intermediate_size))
        self.output_bias = nn.Parameter(torch.zeros(hidden))
        set_roles(self, **{name: LAYER_BIAS for name, _ in self.named_parameters(recurse=False)})

    def forward(self, stream: Tensor, branch: Tensor | None, weights: Weights, mask: Any) -> tuple[Tensor, Tensor]:
        """Stream and branch [B, T, H] → the same two after this layer; `mask` as in `kernels.attention`."""
        stream, x = self.attention_norm(stream, branch)
        attended = attention(
            self._heads(linear(x, weights.query, self.query_bias)),
            self._heads(linear(x, weights.key, self.key_bias)),
            self._heads(linear(x, weights.value, self.value_bias)),
            mask,
            self.scale,
            self.attention_dropout if self.training else 0.0,
        )
        branch = linear(attended.transpose(1, 2).flatten(2), weights.attention_output, self.attention_output_bias)
        stream, x = self.ffn_norm(stream, branch)
        inner = linear_gelu(x, weights.intermediate, self.intermediate_bias)
        return stream, linear(inner, weights.output, self.output_bias)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H] → [B, heads, T, d], a view."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ShareBert(nn.Module):
    """The encoder of Hu et al. (AAAI 2024), with VEPS or EPS; equations in `virtual`."""

    def __init__(self, config: ShareBertConfig) -> None:
        super().__init__()
        self.config = config
        self.sharing: Sharing = OneGeneratedSet(config)
        hidden, factor, weight = config.hidden_size, config.factor_size, weight_role(config.initializer_range)
        self.word_embeddings = set_roles(nn.Embedding(config.vocab_size, factor), weight=weight)
        if config.sharing == "veps":
            self.pre_factor_norm = _factor_norm(factor, config)
            self.factor_linear = set_roles(nn.Linear(factor, hidden), weight=weight, bias=ZERO_BIAS)
            # E has standard deviation `initializer_range`; with W_all N(0, 1/F) the matrices have the same.
            start = weight.start._replace(variance=Normal(1 / sqrt(factor)))
            self.factor_linear_all = set_roles(
                nn.Linear(factor, hidden), weight=weight._replace(start=start), bias=ZERO_BIAS
            )
        self.pos_factor_norm = _factor_norm(hidden, config)
        self.position_embeddings = set_roles(nn.Embedding(config.max_position_embeddings, hidden), weight=weight)
        self.token_type_embeddings = set_roles(nn.Embedding(config.type_vocab_size, hidden), weight=weight)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = AddDropoutNorm(config)
        self.pooler_bias = nn.Parameter(torch.zeros(hidden))
        set_roles(self, pooler_bias=LAYER_BIAS)
        self.recompute = False
        """Whether the backward pass computes each layer again, so that only the layer's input is kept."""

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        pool: bool = True,
    ) -> Encoded:
        """Encode a batch of rows.

        Args:
            tokens: [B, T], int32 or int64 ids, T at most `max_position_embeddings`.
            attention_mask: [B, T], 0 at padding; None if there is no padding.
            token_type_ids: [B, T], int32 or int64; None for type 0 everywhere.
            document_ids: [B, T], the number of each position's document. With it, a position sees only its own
                document.
            pool: make the pooled output too (it costs one more generated matrix).

        Raises ShareBertError if rows are longer than the model's positions.
        """
        weights = self.layer_weights(pool)
        stream, branch = self._embed(tokens, token_type_ids), None
        mask = visible(attention_mask, document_ids)
        for index, layer in enumerate(self.layers):
            given = stream, branch, weights.of_layer(index), mask
            if self.recompute and torch.is_grad_enabled():
                stream, branch = checkpoint(layer, *given, use_reentrant=False)
            else:
                stream, branch = layer(*given)
        _, hidden = self.final_norm(stream, branch)
        pooled = None if weights.pooler is None else linear(hidden[:, 0], weights.pooler, self.pooler_bias)
        return Encoded(hidden, pooled)

    def layer_weights(self, pooler: bool = True) -> LayerWeights:
        """The matrices of all layers, and the pooler's if `pooler` is true."""
        return self.sharing(self, pooler)

    def embed_words(self, factors: Tensor) -> Tensor:
        """Rows of E [..., F] as they enter the residual stream, before position and type, [..., H]."""
        if self.config.sharing == "veps":
            factors = self.factor_linear(self.pre_factor_norm(factors))
        return self.pos_factor_norm(factors)  # type: ignore[no-any-return]

    def _embed(self, tokens: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """The start of the residual stream, [B, T, H]."""
        length = tokens.shape[1]
        if length > self.config.max_position_embeddings:
            raise ShareBertError(
                f"rows of {length} tokens, but the model has {self.config.max_position_embeddings} positions "
                "(max_position_embeddings): cut the text or split it"
            )
        words = self.embed_words(self.word_embeddings(tokens))
        positions = self.position_embeddings(torch.arange(length, device=tokens.device))
        types = self.token_type_embeddings(tokens.new_zeros(1) if token_type_ids is None else token_type_ids)
        return F.dropout(words + positions + types, self.config.hidden_dropout_prob, self.training)


def _factor_norm(width: int, config: ShareBertConfig) -> nn.LayerNorm:
    """A LayerNorm of the input embedding."""
    return set_roles(nn.LayerNorm(width, eps=config.layer_norm_eps), weight=FACTOR_NORM_WEIGHT, bias=ZERO_BIAS)


def visible(attention_mask: Tensor | None, document_ids: Tensor | None) -> Any:
    """The mask for `kernels.attention`; None if all positions see all positions.

    A position that would see nothing (in a row that is all padding) sees everything instead: nobody uses its
    output, but NaN there would spoil the gradients.
    """
    if document_ids is not None:
        if attention_mask is not None:  # padding becomes one more document
            document_ids = torch.where(attention_mask.bool(), document_ids.to(torch.int32), -1)
        return document_mask(document_ids)
    if attention_mask is None:
        return None
    mask = attention_mask.bool()[:, None, None, :]
    return mask | ~mask.any(-1, keepdim=True)
