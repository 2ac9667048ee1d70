"""What calibration rows say about a dense model: its stream, and which components, heads, columns and channels matter.

Importance of heads and columns is that of `structure`, but of each layer alone: layers of a dense model have their own
matrices. Channels between the two matrices of the head, or between pooler and classifier, matter by what they add to
logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calibrate import Batch, first_position, losses_of, random_product, random_scores
from compress.prune.structure import least_important
from exports.dense_model import DenseBert, DenseLayer


class Gradients(NamedTuple):
    """Gradients by factors of 1 on parts, for each calibration row."""

    heads: Tensor
    """[rows, L, heads]"""
    columns: Tensor
    """[rows, L, I]"""
    components: Tensor
    """[rows, components]"""

    def kept_components(self, count: int) -> Tensor:
        """Numbers of the components of the stream that stay, ascending."""
        return _kept(self.components, count)

    def kept(self, heads: int, columns: int) -> list[Kept]:
        """What stays of each layer: `heads` heads and `columns` columns."""
        pairs = zip(self.heads.unbind(1), self.columns.unbind(1), strict=True)
        return [Kept(_kept(of_heads, heads), _kept(of_columns, columns)) for of_heads, of_columns in pairs]


class Kept(NamedTuple):
    """What stays of a layer."""

    heads: Tensor
    """Numbers of heads, ascending."""
    columns: Tensor
    """Numbers of columns inside the feed-forward block, ascending."""


class Head(NamedTuple):
    """The two matrices after the stream."""

    read: nn.Linear
    between: Callable[[Tensor], Tensor]
    """What `write` reads, [n, H], from hidden states [n, H]."""
    write: nn.Linear


def head_of(model: DenseBert) -> Head | None:
    """The masked-language-model head of a model, or its pooler and classifier; None where it has neither."""
    if model.cls is not None:
        head = model.cls.predictions
        return Head(head.transform.dense, head.transformed, head.decoder)
    if model.classifier is not None:
        return Head(model.bert.pooler.dense, lambda hidden: model.pooled(hidden[:, None]), model.classifier)
    return None


def read_by_head(model: DenseBert, batch: Batch) -> Tensor:
    """[B, T], True where a head reads hidden states: at words to predict, or at the first position for a classifier."""
    return batch.labels >= 0 if model.classifier is None else first_position(batch.tokens)


def gradients(model: DenseBert, rows: Sequence[Batch], seed: int, components: Tensor) -> Gradients:
    """The gradients of the loss of each calibration row, or of what `calibrate.objective` takes without a head; of a
    classifier, of `calibrate.random_scores`.

    `components`: those of the stream that have a factor each, orthonormal [H, components]. Every LayerNorm reads the
    stream with these factors.
    """
    layers: list[DenseLayer] = list(model.bert.encoder.layer)
    generator = torch.Generator().manual_seed(seed)
    heads, columns = layers[0].heads, layers[0].output.dense.in_features
    basis = components.to(model.bert.encoder.ln.weight.dtype)
    found: list[list[Tensor]] = []
    for batch in rows:
        factors = [torch.ones(len(batch.tokens), len(layers), size, requires_grad=True) for size in (heads, columns)]
        factors.append(torch.ones(len(batch.tokens), basis.shape[1], requires_grad=True))
        hooks = [norm.register_forward_pre_hook(_Along(basis, factors[2])) for norm in norms_of(model)]
        for number, layer in enumerate(layers):
            for module, factor in ((layer.attention.output.dense, factors[0]), (layer.output.dense, factors[1])):
                hooks.append(module.register_forward_pre_hook(_Times(factor[:, number])))
        hidden = model.encode(batch.tokens, batch.visible)
        if model.cls is not None:
            total = losses_of(model.cls.predictions(hidden[batch.labels >= 0]), batch)
        elif model.classifier is not None:
            total = random_scores(model.classifier(model.pooled(hidden)), generator)
        else:
            total = random_product(hidden, batch, generator)
        found.append(list(torch.autograd.grad(total, factors)))
        for hook in hooks:
            hook.remove()
    return Gradients(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class _Times:
    """Multiplies the input [B, T, width] of a module by factors [B, parts], one for each part of the width."""

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors

    def __call__(self, _: nn.Module, given: tuple[Tensor]) -> Tensor:
        (x,) = given
        wide = self.factors.repeat_interleave(x.shape[-1] // self.factors.shape[1], 1)
        return x * wide[:, None]


class _Along:
    """Multiplies the components [H, parts] of the input [B, T, H] of a module by factors [B, parts]."""

    def __init__(self, basis: Tensor, factors: Tensor) -> None:
        self.basis, self.factors = basis, factors

    def __call__(self, _: nn.Module, given: tuple[Tensor]) -> Tensor:
        (x,) = given
        return x + x @ self.basis * (self.factors - 1)[:, None] @ self.basis.t()


def norms_of(model: DenseBert) -> list[nn.LayerNorm]:
    """The LayerNorms that read the stream."""
    encoder = model.bert.encoder
    return [encoder.ln, *(norm for layer in encoder.layer for norm in (layer.attention.ln, layer.ln))]


def _kept(by_rows: Tensor, count: int) -> Tensor:
    """Numbers of the parts that stay, by gradients [rows, parts]."""
    parts = by_rows.shape[1]
    gone = least_important(by_rows.double().t() @ by_rows.double(), parts - count) if count < parts else []
    return torch.tensor(sorted(set(range(parts)) - set(gone)))


class Survey(NamedTuple):
    """Sums over calibration rows."""

    moments: Tensor
    """norm(x)ᵀ·norm(x) of the stream x at all LayerNorms together, [H, H] float64."""
    head_channels: Tensor | None
    """What each channel between the two matrices of the head, or between pooler and classifier, adds to logits: its
    standard deviation times the norm of its column of the second, [H] float64. None without either."""


@torch.no_grad()
def survey(model: DenseBert, rows: Sequence[Batch]) -> Survey:
    """Run all rows through the model once."""
    width = model.bert.encoder.ln.normalized_shape[0]
    head = head_of(model)
    moments, seen = torch.zeros(width, width, dtype=torch.float64), torch.zeros(0)

    def add(norm: nn.LayerNorm, given: tuple[Tensor]) -> None:
        flat = F.layer_norm(given[0][seen], norm.normalized_shape, eps=norm.eps).double()
        moments.addmm_(flat.t(), flat)

    hooks = [norm.register_forward_pre_hook(add) for norm in norms_of(model)]
    count, first, second = 0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for batch in rows:
        seen = batch.visible.bool()
        hidden = model.encode(batch.tokens, batch.visible)
        if head is not None:
            between = head.between(hidden[read_by_head(model, batch)])
            count += len(between)
            first += between.double().sum(0)
            second += between.double().square().sum(0)
    for hook in hooks:
        hook.remove()
    if head is None:
        return Survey(moments, None)
    variance = (second / max(1, count) - (first / max(1, count)).square()).clamp(min=0)
    return Survey(moments, variance.sqrt() * head.write.weight.norm(dim=0))


@torch.no_grad()
def channel_magnitudes(model: DenseBert) -> Tensor:
    """The magnitude of each channel of the stream, [H] float64: the squared numbers of each matrix that writes or reads
    it, over their mean, so that every matrix counts the same; one of zeros alone counts nothing."""
    sides = [(part.weight, 0) for part in model.bert.embeddings.children()]  # the side that is summed over
    for layer in model.bert.encoder.layer:
        products, gains = layer.attention.self, layer.attention.ln.weight
        sides += [(part.weight * gains, 0) for part in (products.query, products.key, products.value)]
        sides += [(layer.intermediate.dense.weight * layer.ln.weight, 0)]
        sides += [(layer.attention.output.dense.weight, 1), (layer.output.dense.weight, 1)]
    head = head_of(model)
    if head is not None:
        sides.append((head.read.weight * model.bert.encoder.ln.weight, 0))
    squares = [weight.double().square().sum(side) for weight, side in sides]
    return torch.stack([square / square.mean().clamp(min=1e-300) for square in squares]).sum(0)
