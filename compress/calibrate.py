"""What calibration rows say about a model: its loss on them, and its forward pass with masks on its parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.source import config_of, is_classifier
from compress.step import MASK_RATE, Source, Tools
from exports.tokenizer import load_tokenizer
from sharebert.encoder import Layer, visible
from sharebert.heads import ShareBertForMaskedLM
from sharebert.kernels import attention, linear_gelu
from sharebert.plain_modules import embedding_matrix
from sharebert.shared_linear import linear
from sharebert_common.errors import BadInput

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Batch(NamedTuple):
    """Rows to run, and what is to be predicted in them."""

    tokens: Tensor
    """[B, T], with [MASK] at the chosen positions."""
    visible: Tensor
    """[B, T], 0 at padding."""
    labels: Tensor
    """[B, T], the word at chosen positions, -100 elsewhere."""
    read: Tensor | None = None
    """[B, T], 0 where no head reads hidden states; None: they are read wherever a row is visible."""


def batches(tokens: Tensor, tokenizer: Path, seed: int, rows_at_once: int = 32) -> list[Batch]:
    """Calibration rows with 15 % of their words masked, in batches. Every row has one chosen word at least.

    Args:
        tokens: [rows, length].
        tokenizer: a `tokenizer.json` with the special tokens of BERT.
        seed: decides the chosen words.
        rows_at_once: rows of a batch.

    Raises BadInput: the tokenizer lacks a special token.
    """
    words = load_tokenizer(tokenizer)
    ids = {name: words.token_to_id(name) for name in SPECIAL}
    if missing := [name for name, number in ids.items() if number is None]:
        raise BadInput(f"{tokenizer}: has no token {missing[0]}, which masked language modelling needs")
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(list(ids.values()))
    found = []
    for part in tokens.split(rows_at_once):
        scores = torch.rand(part.shape, generator=generator)
        scores[torch.isin(part, special)] = 2.0
        chosen = (scores < MASK_RATE) | (scores == scores.min(1, keepdim=True).values)
        chosen &= scores < 2.0
        labels = torch.where(chosen, part, -100)
        masked = torch.where(chosen, ids["[MASK]"], part)
        found.append(Batch(masked, (part != ids["[PAD]"]).long(), labels))
    return found


def calibration_batches(source: Source, tools: Tools, rows_at_once: int = 32) -> list[Batch]:
    """The calibration rows of a step in batches, masked with the tokenizer of `source`; see `batches`. A classifier
    with a pooler reads the first position alone."""
    found = batches(tools.calibration(), source.folder / "tokenizer.json", tools.seed, rows_at_once)
    pooling = config_of(source.folder).get("classifier_pooling") or "pooler"
    if not (is_classifier(source.folder) and pooling == "pooler"):
        return found
    return [batch._replace(read=first_position(batch.tokens)) for batch in found]


def first_position(tokens: Tensor) -> Tensor:
    """[B, T], True at the first position alone, for tokens [B, T]."""
    return (torch.arange(tokens.shape[1]) == 0).expand_as(tokens)


Watch = Callable[[int, str, Tensor], None]
"""Is given the number of a layer, the name of a matrix, and what it is multiplied by [B, T, width] (`query` stands for
key and value too); or `branches`, and what the layer adds to the stream [B, T, H]."""


def hidden_states(
    model: ShareBertForMaskedLM,
    batch: Batch,
    heads: Tensor | None = None,
    columns: Tensor | None = None,
    layers: Tensor | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """The hidden states [B, T, H], with factors on parts of the model.

    Args:
        model: in evaluation mode.
        batch: the rows.
        heads: [B or 1, heads], a factor on the output of each head, the same in all layers.
        columns: [B or 1, inner], a factor on each column inside the feed-forward block, likewise.
        layers: [B or 1, L], a factor on what each layer adds to the stream.
        watch: see `Watch`.
    """
    encoder = model.sharebert
    weights = encoder.layer_weights(pooler=False)
    stream = encoder._embed(encoder.word_embeddings(batch.tokens), None, None)
    mask = visible(batch.visible, None)
    for index, layer in enumerate(encoder.layers):
        assert isinstance(layer, Layer)
        matrices = weights.of_layer(index)
        _, first = layer.attention_norm(stream, None)
        attended = attention(*layer.project(first, matrices), mask, layer.scale, 0.0)
        if heads is not None:
            attended = attended * heads[:, :, None, None]
        attended = attended.transpose(1, 2).flatten(2)
        branch = layer.gained(linear(attended, matrices.attention_output, layer.attention_output_bias), 0)
        factor = 1.0 if layers is None else layers[:, index, None, None]
        middle = stream + branch * factor
        _, x = layer.ffn_norm(middle, None)
        inner = linear_gelu(x, matrices.intermediate, layer.intermediate_bias)
        if columns is not None:
            inner = inner * columns[:, None, :]
        second = layer.gained(linear(inner, matrices.output, layer.output_bias), 1)
        if watch is not None:
            watch(index, "query", first)
            watch(index, "intermediate", x)
            watch(index, "attention_output", attended)
            watch(index, "output", inner)
            watch(index, "branches", branch + second)
        stream = middle + second * factor
    return encoder.final_norm(stream, None)[1]


def hidden_error(hidden: Tensor, expected: Tensor, batch: Batch) -> Tensor:
    """The squared error of hidden states [B, T, H] as a part of their mean square; padding does not count."""
    seen = batch.visible.bool()
    return F.mse_loss(hidden[seen], expected[seen]) / expected[seen].square().mean()


def objective(model: ShareBertForMaskedLM, batch: Batch, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The sum over rows of what gradients are taken of.

    With a masked-language-model head it is the loss at the chosen words, a mean over those of each row. Without one it
    is the product of the hidden states with random numbers: the mean of its squared gradients over many rows is the
    Gauss-Newton matrix of the squared error of the hidden states.
    """
    if model.mlm_head is None:
        return random_product(hidden, batch, generator)
    embedding = embedding_matrix(model.sharebert.word_embeddings, model.config.vocab_size)
    chosen = batch.labels >= 0
    logits = model.mlm_head(
        hidden[chosen], embedding if model.mlm_head.tied else None, expansion=model.sharebert.factor_expansion
    )
    assert isinstance(logits, Tensor)
    return losses_of(logits, batch)


def random_product(hidden: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """The sum over rows of the products of hidden states [B, T, H] with random numbers; see `objective`."""
    directions = torch.randn(hidden.shape, generator=generator)
    read = batch.visible if batch.read is None else batch.read
    return (hidden * directions * read[:, :, None]).sum() / hidden.shape[1]


def random_scores(scores: Tensor, generator: torch.Generator) -> Tensor:
    """The sum over rows of the products of a classifier's scores [B, labels] with random numbers, so that no row needs
    a label; see `objective`."""
    return (scores * torch.randn(scores.shape, generator=generator)).sum()


def losses_of(logits: Tensor, batch: Batch) -> Tensor:
    """The sum over rows of the loss, by logits [chosen words, V] at the chosen words; see `objective`."""
    chosen = batch.labels >= 0
    losses = F.cross_entropy(logits, batch.labels[chosen], reduction="none")
    return (losses / chosen.sum(1).repeat_interleave(chosen.sum(1))).sum()
