"""The encoder: pre-LN transformer layers that own biases and norms, and share six generated matrices."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import ShareBertConfig, ShareBertError
from .kernels import add_dropout_norm, attention, document_mask, linear, linear_gelu
from .virtual import Weights, blocks, generate


class Encoded(NamedTuple):
    """What the encoder makes of a batch."""

    hidden: Tensor
    """[B, T, H], after the final LayerNorm."""
    pooled: Tensor | None
    """[B, H], from the first position, without activation; None unless asked for."""


class ResidualNorm(nn.LayerNorm):
    """Adds a block's output to the residual stream, with dropout, and normalises the sum."""

    def __init__(self, config: ShareBertConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout_prob

    def forward(self, stream: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The new stream [B, T, H] and its LayerNorm [B, T, H]."""
        dropout = self.dropout if self.training else 0.0
        return add_dropout_norm(stream, branch, self.weight, self.bias, self.eps, dropout)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a LayerNorm. Its matrices are given to it.

    A layer takes the stream and the branch that is still to be added to it, and hands on the same two, so that
    every addition stands next to the LayerNorm that follows it.
    """

    def __init__(self, config: ShareBertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads = config.num_attention_heads
        self.scale = config.score_scale
        self.attention_dropout = config.attention_probs_dropout_prob
        self.attention_norm = ResidualNorm(config)
        self.query_bias = nn.Parameter(torch.zeros(hidden))
        self.key_bias = nn.Parameter(torch.zeros(hidden))
        self.value_bias = nn.Parameter(torch.zeros(hidden))
        self.attention_output_bias = nn.Parameter(torch.zeros(hidden))
        self.ffn_norm = ResidualNorm(config)
        self.intermediate_bias = nn.Parameter(torch.zeros(config.intermediate_size))
        self.output_bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, stream: Tensor, branch: Tensor | None, weights: Weights, mask: Any) -> tuple[Tensor, Tensor]:
        """Stream and branch [B, T, H] → the same after this layer; `mask` as in `kernels.attention`."""
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
        self.blocks = blocks(config)
        hidden, factor, eps = config.hidden_size, config.factor_size, config.layer_norm_eps
        self.word_embeddings = nn.Embedding(config.vocab_size, factor)
        if config.sharing == "veps":
            self.pre_factor_norm = nn.LayerNorm(factor, eps=eps)
            self.factor_linear = nn.Linear(factor, hidden)
            self.factor_linear_all = nn.Linear(factor, hidden)
        self.pos_factor_norm = nn.LayerNorm(hidden, eps=eps)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = ResidualNorm(config)
        self.pooler_bias = nn.Parameter(torch.zeros(hidden))
        self.recompute = False
        """Whether a layer's values are made again in the backward pass, and only its input is kept."""

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
            attention_mask: [B, T], 0 at padding; None where there is none.
            token_type_ids: [B, T], int32 or int64; None for type 0 everywhere.
            segments: [B, T], the number of each position's document; given, a position sees its own document alone.
            pool: make the pooled output too (it costs a generated matrix).

        Raises ShareBertError where rows are longer than the model's positions.
        """
        weights = self.generate(pool)
        stream, branch = self._embed(tokens, token_type_ids), None
        mask = visible(attention_mask, document_ids)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                stream, branch = checkpoint(layer, stream, branch, weights, mask, use_reentrant=False)
            else:
                stream, branch = layer(stream, branch, weights, mask)
        _, hidden = self.final_norm(stream, branch)
        pooled = None if weights.pooler is None else linear(hidden[:, 0], weights.pooler, self.pooler_bias)
        return Encoded(hidden, pooled)

    def generate(self, pooler: bool = True) -> Weights:
        """The matrices that all layers share, and the pooler's where it is asked for."""
        if self.config.sharing == "eps":
            return generate(self.blocks, self.word_embeddings.weight, None, None, pooler)
        projection = self.factor_linear_all
        return generate(self.blocks, self.word_embeddings.weight, projection.weight, projection.bias, pooler)

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


def visible(attention_mask: Tensor | None, document_ids: Tensor | None) -> Any:
    """What `kernels.attention` takes as a mask; None where all positions see all.

    A position that would see nothing (in a row of padding alone) sees everything instead: its output is not
    used, but must not be NaN.
    """
    if document_ids is not None:
        if attention_mask is not None:  # padding becomes a document of its own
            document_ids = torch.where(attention_mask.bool(), document_ids.to(torch.int32), -1)
        return document_mask(document_ids)
    if attention_mask is None:
        return None
    mask = attention_mask.bool()[:, None, None, :]
    return mask | ~mask.any(-1, keepdim=True)
