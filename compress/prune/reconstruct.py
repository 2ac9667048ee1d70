"""The matrices of a smaller dense model, made anew by least squares on calibration rows.

Both models run side by side, layer by layer. Every matrix of the small one gets the change that brings its output
nearest to what the whole model has there, given the inputs that the small one really has, after the matrices before
have changed: the one that reads the stream, to the whole model's product; the one that writes to it, to what is missing
from the whole model's stream in the kept directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.calibrate import Batch
from compress.prune.dense_parts import Kept, head_of, read_by_head
from compress.prune.dense_slices import head_channels
from compress.prune.directions import Directions
from exports.dense_model import DenseBert, DenseLayer
from sharebert.encoder import visible

DAMPING = 0.001
"""Part of the mean squared input that keeps a matrix near what it was where calibration rows do not decide it."""


@dataclass
class Streams:
    """The streams of both models for a batch."""

    whole: Tensor
    """[B, T, H]"""
    small: Tensor
    """[B, T, k]"""
    mask: Tensor | None
    seen: Tensor
    """[B, T], False at padding."""
    chosen: Tensor
    """[B, T], as `dense_parts.read_by_head` says."""


@torch.no_grad()
def reconstruct(
    model: DenseBert,
    small: DenseBert,
    directions: Directions,
    kept: Sequence[Kept],
    head_rows: Tensor | None,
    rows: Sequence[Batch],
    say: Callable[[str], None],
) -> None:
    """Change the matrices of `small`, which `dense_slices.sliced` made with the same arguments.

    Memory holds both streams of all rows.
    """
    down = directions.down.to(model.bert.encoder.ln.weight.dtype)
    streams = [
        Streams(
            model.embed(batch.tokens),
            small.embed(batch.tokens),
            visible(batch.visible, None),
            batch.visible.bool(),
            read_by_head(model, batch),
        )
        for batch in rows
    ]
    layers = list(zip(model.bert.encoder.layer, small.bert.encoder.layer, kept, strict=True))
    for number, (layer, own, stays) in enumerate(layers, 1):
        _attention(layer, own, stays, down, streams)
        _feed_forward(layer, own, stays, down, streams)
        say(f"prune_hidden: layer {number} of {len(layers)}")
    if head_rows is not None:
        _head(model, small, head_rows, streams)


def _attention(layer: DenseLayer, own: DenseLayer, stays: Kept, down: Tensor, streams: list[Streams]) -> None:
    channels = head_channels(stays.heads, layer.attention.self.query.out_features // layer.heads)
    for name in ("query", "key", "value"):
        product, smaller = layer.attention.self.get_submodule(name), own.attention.self.get_submodule(name)
        assert isinstance(smaller, nn.Linear)
        fit(
            smaller,
            (
                (own.attention.ln(s.small[s.seen]), product(layer.attention.ln(s.whole[s.seen]))[:, channels])
                for s in streams
            ),
        )
    for s in streams:
        s.whole = s.whole + layer.attention.output.dense(layer.attended(s.whole, s.mask))
    output = own.attention.output.dense
    fit(output, ((own.attended(s.small, s.mask)[s.seen], (s.whole @ down - s.small)[s.seen]) for s in streams))
    for s in streams:
        s.small = s.small + output(own.attended(s.small, s.mask))


def _feed_forward(layer: DenseLayer, own: DenseLayer, stays: Kept, down: Tensor, streams: list[Streams]) -> None:
    product = layer.intermediate.dense
    fit(
        own.intermediate.dense,
        ((own.ln(s.small[s.seen]), product(layer.ln(s.whole[s.seen]))[:, stays.columns]) for s in streams),
    )
    for s in streams:
        s.whole = s.whole + layer.output.dense(layer.inner(s.whole))
    output = own.output.dense
    fit(output, ((own.inner(s.small[s.seen]), (s.whole @ down - s.small)[s.seen]) for s in streams))
    for s in streams:
        s.small = s.small + output(own.inner(s.small))


def _head(model: DenseBert, small: DenseBert, rows: Tensor, streams: list[Streams]) -> None:
    """The head, or pooler and classifier, at the only positions that they read."""
    whole, own = head_of(model), head_of(small)
    assert whole is not None
    assert own is not None
    hidden = [(small.bert.encoder.ln(s.small[s.chosen]), model.bert.encoder.ln(s.whole[s.chosen])) for s in streams]
    fit(own.read, ((m, whole.read(n)[:, rows]) for m, n in hidden))
    width, dtype = whole.write.in_features, whole.write.weight.dtype
    widened = nn.Linear(len(rows), width, dtype=dtype)
    widened.weight.copy_(torch.eye(width, dtype=dtype)[:, rows])
    widened.bias.zero_()
    fit(widened, ((own.between(m), whole.between(n)) for m, n in hidden))
    own.write.weight.copy_(whole.write.weight @ widened.weight)
    own.write.bias.copy_(whole.write.bias + whole.write.weight @ widened.bias)
    if small.cls is not None:
        small.cls.predictions.bias.copy_(own.write.bias)


def fit(linear: nn.Linear, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Change weight and bias of `linear` so that its outputs are nearest to the targets, by damped least squares.

    Args:
        linear: [in → out]; the damping holds it near what it is.
        pairs: inputs [n, in] and targets [n, out], batch by batch.
    """
    inputs, outputs = linear.in_features, linear.out_features
    count, first = 0, torch.zeros(inputs, dtype=torch.float64)
    missing = torch.zeros(outputs, dtype=torch.float64)
    second = torch.zeros(inputs, inputs, dtype=torch.float64)
    mixed = torch.zeros(inputs, outputs, dtype=torch.float64)
    for x, target in pairs:
        residual, x = (target - linear(x)).double(), x.double()
        count += len(x)
        first += x.sum(0)
        missing += residual.sum(0)
        second.addmm_(x.t(), x)
        mixed.addmm_(x.t(), residual)
    first, missing = first / count, missing / count
    covariance = second / count - torch.outer(first, first)
    damping = DAMPING * covariance.diagonal().mean().clamp(min=1e-30)
    system = covariance + damping * torch.eye(inputs, dtype=torch.float64)
    change = torch.linalg.solve(system, mixed / count - torch.outer(first, missing))
    linear.weight.add_(change.t().to(linear.weight.dtype))
    linear.bias.add_((missing - first @ change).to(linear.bias.dtype))
