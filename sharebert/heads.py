"""The head for masked language modelling (MLM), and the model that is pretrained: encoder and head."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import ShareBertConfig, ShareBertError
from .encoder import ShareBert
from .kernels import add_dropout_norm, linear_cross_entropy, linear_gelu
from .plain_modules import embedding_matrix, is_plain
from .roles import NORM_WEIGHT, ZERO_BIAS, Role, Start, Uniform, set_roles, weight_role


class MlmOutput(NamedTuple):
    """Sums over the chosen positions of a batch; divide by a sum of loss weights for means."""

    loss_sum: Tensor
    """Scalar, float32: Σ weight · cross-entropy, in nats."""
    correct: Tensor
    """Scalar, float32: Σ weight · [the likeliest word is the label]. It has no gradient."""


class MlmHead(nn.Module):
    """norm(gelu(dense(x))), then the scores of all words: by its own decoder (untied), or by E and a bias (tied)."""

    def __init__(self, config: ShareBertConfig) -> None:
        super().__init__()
        self.tied = config.mlm_head == "tied"
        width = config.row_size if self.tied else config.hidden_size
        uniform = Uniform(1 / sqrt(config.hidden_size))
        start = Start(uniform, uniform)
        self.dense = nn.Linear(config.hidden_size, width)
        set_roles(self.dense, weight=Role(True, start), bias=Role(False, start))
        self.norm = set_roles(nn.LayerNorm(width, eps=config.layer_norm_eps), weight=NORM_WEIGHT, bias=ZERO_BIAS)
        if self.tied:
            self.bias = nn.Parameter(torch.zeros(config.vocab_size))
            set_roles(self, bias=ZERO_BIAS)
        else:
            decoder = nn.Linear(width, config.vocab_size, bias=False)
            self.decoder = set_roles(decoder, weight=weight_role(config.initializer_range))

    def forward(
        self,
        hidden: Tensor,
        embedding: Tensor | None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        expansion: nn.Linear | None = None,
    ) -> Tensor | MlmOutput:
        """Logits [N, V] of `hidden` [N, H], or their loss if labels and loss weights [N] are given.

        `embedding` is E [V, F] for a tied head, and None for an untied one; `expansion` is the encoder's.
        """
        if labels is None and not (is_plain(self.dense) and (self.tied or is_plain(self.decoder))):
            x = self._narrow(self.norm(nn.functional.gelu(self.dense(hidden))), expansion)
            return nn.functional.linear(x, embedding, self.bias) if embedding is not None else self.decoder(x)
        x = linear_gelu(hidden, self.dense.weight.t(), self.dense.bias)
        _, x = add_dropout_norm(x, None, self.norm.weight, self.norm.bias, self.norm.eps, 0.0)
        x = self._narrow(x, expansion)
        matrix = embedding if self.tied else self.decoder.weight
        bias = self.bias if self.tied else None
        assert matrix is not None
        if labels is None or loss_weights is None:
            return nn.functional.linear(x, matrix, bias)
        return MlmOutput(*linear_cross_entropy(x, matrix, bias, labels, loss_weights))

    def _narrow(self, x: Tensor, expansion: nn.Linear | None) -> Tensor:
        """What multiplies E, [..., F], of a tied head: x·(E·Xᵀ)ᵀ is (x·X)·Eᵀ."""
        return x if expansion is None or not self.tied else x @ expansion.weight.to(x.dtype)


class ShareBertForMaskedLM(nn.Module):
    """Encoder and MLM head: what is pretrained, and what an export holds.

    With `mlm_head: none` it is the encoder alone, under the names of an export; it has no loss and no logits.
    """

    def __init__(self, config: ShareBertConfig) -> None:
        super().__init__()
        self.config = config
        self.sharebert = ShareBert(config)
        self.mlm_head = None if config.mlm_head == "none" else MlmHead(config)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
    ) -> MlmOutput:
        """The loss at chosen positions of a batch.

        Args:
            tokens: [B, T], as in `ShareBert.forward`, like the next three.
            positions: [N], int64: flat indices into B·T. Unused entries have loss weight 0.
            labels: [N], int64: the word at each position.
            loss_weights: [N], float32.

        Raises ShareBertError if the model has no MLM head.
        """
        output = self._head(
            self._rows(tokens, attention_mask, token_type_ids, document_ids, positions), labels, loss_weights
        )
        assert isinstance(output, MlmOutput)
        return output

    def logits(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Scores of all words: [N, V] at flat `positions` [N], or [B, T, V] at every position.

        Raises ShareBertError if the model has no MLM head.
        """
        scores = self._head(self._rows(tokens, attention_mask, token_type_ids, document_ids, positions))
        assert isinstance(scores, Tensor)
        return scores if positions is not None else scores.unflatten(0, tuple(tokens.shape))

    def _rows(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        document_ids: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Hidden states [N, H] at flat `positions`, or at all of them."""
        encoded = self.sharebert(tokens, attention_mask, token_type_ids, document_ids=document_ids, pool=False)
        rows = encoded.hidden.flatten(0, 1)
        return rows if positions is None else rows.index_select(0, positions)

    def _head(
        self, rows: Tensor, labels: Tensor | None = None, loss_weights: Tensor | None = None
    ) -> Tensor | MlmOutput:
        if self.mlm_head is None:
            raise ShareBertError("this model has no MLM head (mlm_head: none), so it has no loss and no logits")
        words = self.sharebert.word_embeddings
        embedding = embedding_matrix(words, self.config.vocab_size) if self.mlm_head.tied else None
        return self.mlm_head(rows, embedding, labels, loss_weights, self.sharebert.factor_expansion)  # type: ignore[no-any-return]
