"""Activation-aware rounding of weights (AWQ), for matrices [out, in] as `nn.Linear` stores them.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024, and its code
(mit-han-lab/llm-awq, auto_scale.py and auto_clip.py): s = mean|x|^α / √(max·min) for each input channel, α from a grid
of 20 values, with the least ‖W·X − Q(W·s)·s⁻¹·X‖²; then each group of weights is clipped where that lowers the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GRID = 20
"""Values of α: 0, 1/20, …, 19/20. α = 0 is plain rounding."""

SMALLEST = 1e-4
"""A channel's mean |x|, before its power is taken, and the result are at least this."""

MOST_CLIPPED, CLIP_STEPS = 0.5, 20
"""A group's range shrinks by at most this part of itself, tried in so many steps."""


class Group(NamedTuple):
    """Matrices that read the same input, in one layer or in all layers that share them."""

    inputs: Sequence[Tensor]
    """The input of each layer, [tokens, in]."""
    matrices: Sequence[Tensor]
    """[out, in] each."""


def rounded(weight: Tensor, bits: int, group_size: int, clip: Tensor | None = None) -> Tensor:
    """`weight` [out, in] rounded to `bits`, with a scale and a zero point for each `group_size` inputs of a row.

    `clip` [out, in / group_size] is a factor on each group's range. group_size must divide in.
    """
    groups = weight.reshape(len(weight), -1, group_size)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    if clip is not None:
        low, high = low * clip[..., None], high * clip[..., None]
    levels = 2**bits - 1
    step = (high - low).clamp(min=1e-5) / levels
    zero = (-low / step).round().clamp(0, levels)
    codes = ((groups / step).round() + zero).clamp(0, levels)
    return ((codes - zero) * step).view_as(weight)


def scales_of(mean_input: Tensor, alpha: float) -> Tensor:
    """s [in] from mean|x| [in]."""
    s = mean_input.clamp(min=SMALLEST).pow(alpha).clamp(min=SMALLEST)
    return s / (s.max() * s.min()).sqrt()


def best_scales(group: Group, bits: int, group_size: int) -> tuple[Tensor, float]:
    """The scales [in] with the least error of the products, and their α. All layers of the group get the same."""
    mean_input = torch.cat(list(group.inputs)).abs().mean(0)
    found: list[tuple[float, float]] = []
    for step in range(GRID):
        s = scales_of(mean_input, step / GRID)
        error = 0.0
        for weight in group.matrices:
            change = rounded(weight * s, bits, group_size) / s - weight
            error += sum((x @ change.t()).square().sum().item() for x in group.inputs)
        found.append((error, step / GRID))
    _, alpha = min(found)
    return scales_of(mean_input, alpha), alpha


def best_clip(inputs: Sequence[Tensor], weight: Tensor, bits: int, group_size: int) -> Tensor:
    """The factor on the range of each group [out, in / group_size] with the least error of that group's products."""
    x = torch.cat(list(inputs))
    x = x.reshape(len(x), -1, group_size)
    shape = len(weight), x.shape[1]
    best, least = torch.ones(shape), torch.full(shape, torch.inf)
    for step in range(round(MOST_CLIPPED * CLIP_STEPS) + 1):
        clip = torch.full(shape, 1 - step / CLIP_STEPS)
        change = (rounded(weight, bits, group_size, clip) - weight).view(*shape, group_size)
        error = torch.einsum("tgi,ogi->tog", x, change).square().mean(0)
        better = error < least
        best[better], least[better] = clip[better], error[better]
    return best
