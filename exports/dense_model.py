"""The dense model: the same function as the compact one, with every generated matrix written out.

The layout is that of `megatron_bert`, the pre-LN BERT of transformers. Every layer has its own matrices, all in
`nn.Linear`, so that tools that do not know ShareBERT can use it.

How the compact model is expressed in that layout:
- the input embedding is x = pos_factor_norm(factor_linear(pre_factor_norm(E))), written out, [V, H];
- `megatron_bert` scales scores by d^(-1/2); with `attention_scale: authors` the remaining factor, d^(-1/6), is
  multiplied into the query;
- its MLM head has one width, H. A tied head of width F is repeated H/F times before the LayerNorm, which changes
  neither mean nor variance, and the decoder reads only the first repetition;
- branch gains are multiplied into the matrices and biases of the outputs of attention and feed-forward block;
- its pooler ends in tanh and that of the compact model does not: its pooled output is the tanh of the compact one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from math import sqrt
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exports.meta_device import without_weights
from sharebert.config import ShareBertConfig
from sharebert.encoder import Layer, ShareBert, visible
from sharebert.heads import MlmHead, ShareBertForMaskedLM
from sharebert_common.errors import BadInput

ROWS_AT_ONCE = 1024
"""Rows of one piece of a tensor that has a row for each word."""


class DenseOutput(NamedTuple):
    """The output of a dense model for a batch."""

    hidden: Tensor
    """[B, T, H], after the final LayerNorm."""
    pooled: Tensor
    """[B, H], the tanh of the compact form's."""
    logits: Tensor | None
    """[B, T, V]; None without an MLM head."""


class Parts(nn.Module):
    """Submodules under the given names: a level in the tree of parameter names, without a function of its own."""

    def __init__(self, /, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class DenseBert(Parts):
    """`megatron_bert` in plain PyTorch, under its parameter names: `state_dict` is a dense export.

    Args:
        config: sizes, and whether there is an MLM head.
        labels: of a classifier, which reads the pooled output; 0: no classifier.
    """

    def __init__(self, config: ShareBertConfig, labels: int = 0) -> None:
        hidden, eps = config.hidden_size, config.layer_norm_eps
        embeddings = Parts(
            word_embeddings=nn.Embedding(config.vocab_size, hidden),
            position_embeddings=nn.Embedding(config.max_position_embeddings, hidden),
            token_type_embeddings=nn.Embedding(config.type_vocab_size, hidden),
        )
        layers = nn.ModuleList(DenseLayer(config) for _ in range(config.num_hidden_layers))
        encoder = Parts(layer=layers, ln=nn.LayerNorm(hidden, eps=eps))
        super().__init__(bert=Parts(embeddings=embeddings, encoder=encoder, pooler=_dense(hidden, hidden)))
        self.cls = None if config.mlm_head == "none" else Parts(predictions=DenseHead(config))
        self.classifier = nn.Linear(hidden, labels) if labels else None

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> DenseOutput:
        """Encode [B, T] ids; `attention_mask` [B, T] is 0 at padding."""
        hidden = self.encode(tokens, attention_mask, token_type_ids)
        return DenseOutput(hidden, self.pooled(hidden), None if self.cls is None else self.cls.predictions(hidden))

    def pooled(self, hidden: Tensor) -> Tensor:
        """The pooled output [B, H] of hidden states [B, T, H]: what a classifier reads."""
        return torch.tanh(self.bert.pooler.dense(hidden[:, 0]))

    def encode(
        self, tokens: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The hidden states alone, [B, T, H]."""
        x, mask = self.embed(tokens, token_type_ids), visible(attention_mask, None)
        for layer in self.bert.encoder.layer:
            x = layer(x, mask)
        return self.bert.encoder.ln(x)  # type: ignore[no-any-return]

    def embed(self, tokens: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """The residual stream before the first layer, [B, T, H]."""
        embeddings = self.bert.embeddings
        longest = embeddings.position_embeddings.num_embeddings
        if tokens.shape[1] > longest:
            raise BadInput(f"rows of {tokens.shape[1]} tokens, but the model has {longest} positions")
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        types = torch.zeros_like(tokens) if token_type_ids is None else token_type_ids
        x = embeddings.word_embeddings(tokens) + embeddings.token_type_embeddings(types)
        return x + embeddings.position_embeddings(positions)  # type: ignore[no-any-return]


class DenseLayer(Parts):
    """One layer of `megatron_bert` for inference, without dropout."""

    def __init__(self, config: ShareBertConfig) -> None:
        hidden, attended = config.hidden_size, config.attention_size
        inner, eps = config.inner_size, config.layer_norm_eps
        square = Parts(**{name: nn.Linear(hidden, attended) for name in ("query", "key", "value")})
        super().__init__(
            attention=Parts(ln=nn.LayerNorm(hidden, eps=eps), self=square, output=_dense(attended, hidden)),
            ln=nn.LayerNorm(hidden, eps=eps),
            intermediate=_dense(hidden, inner),
            output=_dense(inner, hidden),
        )
        self.heads = config.heads

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, H] → [B, T, H]; `mask` as in `kernels.attention`."""
        x = x + self.attention.output.dense(self.attended(x, mask))
        return x + self.output.dense(self.inner(x))  # type: ignore[no-any-return]

    def attended(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What the output matrix of attention reads, the heads side by side, [B, T, heads · d]."""
        normed, products = self.attention.ln(x), self.attention.self
        query, key, value = (
            product(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for product in (products.query, products.key, products.value)
        )
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)

    def inner(self, x: Tensor) -> Tensor:
        """What the output matrix of the feed-forward block reads, [B, T, I]; x is the stream after attention."""
        return F.gelu(self.intermediate.dense(self.ln(x)))


class DenseHead(Parts):
    """The MLM head of `megatron_bert`. It stores its bias under two names, and reads the one of the decoder."""

    def __init__(self, config: ShareBertConfig) -> None:
        hidden = config.hidden_size
        norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        super().__init__(
            transform=Parts(dense=nn.Linear(hidden, hidden), LayerNorm=norm),
            decoder=nn.Linear(hidden, config.vocab_size),
        )
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] → [..., V]."""
        return self.decoder(self.transformed(hidden))  # type: ignore[no-any-return]

    def transformed(self, hidden: Tensor) -> Tensor:
        """What the decoder reads, [..., H]."""
        return self.transform.LayerNorm(F.gelu(self.transform.dense(hidden)))  # type: ignore[no-any-return]


def _dense(inputs: int, outputs: int) -> Parts:
    return Parts(dense=nn.Linear(inputs, outputs))


def check_fits(config: ShareBertConfig) -> None:
    """Raises BadInput where the MLM head has no dense form."""
    if config.mlm_head == "tied" and config.hidden_size % config.row_size:
        raise BadInput(
            f"a tied MLM head has a dense form only where factor_size ({config.row_size}) divides "
            f"hidden_size ({config.hidden_size}); export the encoder alone (--no-head)"
        )


def dense_shapes(config: ShareBertConfig, labels: int = 0) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the dense form, in the order in which `dense_tensors` gives them; with `labels`
    those of a classifier too.

    Raises BadInput where the MLM head has no dense form.
    """
    check_fits(config)
    with without_weights():
        model = DenseBert(config, labels)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@torch.no_grad()
def dense_tensors(model: ShareBertForMaskedLM) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor of the dense form, one at a time, in the dtype of the model's parameters.

    Raises BadInput where the MLM head has no dense form.
    """
    shapes = dense_shapes(model.config)
    for name, parts in groupby(dense_pieces(model), key=itemgetter(0)):
        values = [part for _, part in parts]
        yield name, (values[0] if len(values) == 1 else torch.cat(values)).view(shapes[name])


@torch.no_grad()
def dense_pieces(model: ShareBertForMaskedLM) -> Iterator[tuple[str, Tensor]]:
    """The same in pieces: a tensor whole, or some rows at a time where it has a row for each word.

    Memory holds the generated matrices once, and for a moment twice where there are several feed-forward pairs. The
    columns that they take, H at most, make them no larger than the input embedding, the largest tensor of the dense
    form.

    Raises BadInput where the MLM head has no dense form.
    """
    check_fits(model.config)
    encoder, config = model.sharebert, model.config
    for factors in encoder.word_embeddings.weight.split(ROWS_AT_ONCE):
        yield "bert.embeddings.word_embeddings.weight", encoder.embed_words(factors)
    yield from encoder_tensors(encoder)
    if model.mlm_head is not None:
        yield from _head(model.mlm_head, encoder, config)


@torch.no_grad()
def encoder_tensors(encoder: ShareBert) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor of the dense encoder but the word embeddings. Layers that share a matrix get the
    same one."""
    yield "bert.embeddings.position_embeddings.weight", encoder.position_embeddings.weight
    yield "bert.embeddings.token_type_embeddings.weight", encoder.token_type_embeddings.weight
    config, pairs = encoder.config, {0: _matrices(encoder, 0)}
    for number, layer in enumerate(encoder.layers):
        if config.sharing == "none" and number:
            pairs = {0: _matrices(encoder, number)}
        pair = config.ffn_pair(number)
        if pair not in pairs:
            made = _matrices(encoder, number)
            pairs[pair] = pairs[0] | {name: made[name] for name in ("intermediate", "output")}
            del made
        assert isinstance(layer, Layer)
        yield from _layer(f"bert.encoder.layer.{number}.", layer, pairs[pair], _query_factor(config))
    yield from _norm("bert.encoder.ln", encoder.final_norm)
    yield from _linear("bert.pooler.dense", pairs[0]["pooler"], encoder.pooler_bias)


def _matrices(encoder: ShareBert, layer: int) -> dict[str, Tensor]:
    """The matrices of a layer and the pooler's, by name, [out, in] as in `nn.Linear`, the query with its factor."""
    weights = encoder.layer_weights()
    encoder.forget_weights()
    given: dict[str, Tensor | None] = {**weights.of_layer(layer).written_out()._asdict(), "pooler": weights.pooler}
    del weights
    made = {}
    while given:  # takes each out before the next is copied, so that only one is in memory twice
        name, weight = given.popitem()
        assert weight is not None
        made[name] = weight.t().contiguous()
    made["query"].mul_(_query_factor(encoder.config))
    return made


def _query_factor(config: ShareBertConfig) -> float:
    return config.score_scale * sqrt(config.head_size)


def _layer(prefix: str, layer: Layer, made: dict[str, Tensor], factor: float) -> Iterator[tuple[str, Tensor]]:
    yield from _norm(prefix + "attention.ln", layer.attention_norm)
    yield from _linear(prefix + "attention.self.query", made["query"], layer.query_bias * factor)
    yield from _linear(prefix + "attention.self.key", made["key"], layer.key_bias)
    yield from _linear(prefix + "attention.self.value", made["value"], layer.value_bias)
    yield from _gained(
        layer, 0, prefix + "attention.output.dense", made["attention_output"], layer.attention_output_bias
    )
    yield from _norm(prefix + "ln", layer.ffn_norm)
    yield from _linear(prefix + "intermediate.dense", made["intermediate"], layer.intermediate_bias)
    yield from _gained(layer, 1, prefix + "output.dense", made["output"], layer.output_bias)


def _gained(layer: Layer, branch: int, name: str, weight: Tensor, bias: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The last product of a branch, with its gain."""
    gain = layer.gain(branch)
    return _linear(name, weight, bias) if gain is None else _linear(name, weight * gain, bias * gain)


def _head(head: MlmHead, encoder: ShareBert, config: ShareBertConfig) -> Iterator[tuple[str, Tensor]]:
    embedding, expansion = encoder.word_embeddings.weight, encoder.factor_expansion
    bias = head.bias if head.tied else embedding.new_zeros(config.vocab_size)
    times = config.hidden_size // len(head.norm.weight)
    yield "cls.predictions.bias", bias
    yield "cls.predictions.transform.dense.weight", head.dense.weight.repeat(times, 1)
    yield "cls.predictions.transform.dense.bias", head.dense.bias.repeat(times)
    yield "cls.predictions.transform.LayerNorm.weight", head.norm.weight.repeat(times)
    yield "cls.predictions.transform.LayerNorm.bias", head.norm.bias.repeat(times)
    for rows in (embedding if head.tied else head.decoder.weight).split(ROWS_AT_ONCE):
        if head.tied and expansion is not None:
            rows = expansion(rows)
        yield "cls.predictions.decoder.weight", F.pad(rows, (0, config.hidden_size - rows.shape[1]))
    yield "cls.predictions.decoder.bias", bias.clone()  # torch takes two names of one memory for one tensor


def _norm(name: str, norm: nn.LayerNorm) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", norm.weight
    yield f"{name}.bias", norm.bias


def _linear(name: str, weight: Tensor, bias: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", bias
