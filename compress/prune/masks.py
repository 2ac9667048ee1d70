"""Which weights go: the least important ones by their scores, in all matrices together, in each, or two of four."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["global", "matrix", "2:4"]


def smallest(scores: Mapping[str, Tensor], sparsity: float, scope: Scope) -> dict[str, Tensor]:
    """Where the least important weights are, bool, of the shape of the scores [rows, columns].

    Args:
        scores: what each weight is worth, by matrix.
        sparsity: the share of the weights that go. With `2:4`, two of each four neighbours of a row go, whatever it
            says; what is left over at the end of a row stays.
        scope: whether the share is that of all matrices together, or of each.
    """
    if scope == "2:4":
        return {name: two_of_four(values) for name, values in scores.items()}
    if scope == "matrix":
        return {name: _lowest(values.flatten(), sparsity).view(values.shape) for name, values in scores.items()}
    together = _lowest(torch.cat([values.flatten() for values in scores.values()]), sparsity)
    parts = together.split([values.numel() for values in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def two_of_four(scores: Tensor) -> Tensor:
    """Where the two smaller scores of each four neighbours of a row are, bool [rows, columns]."""
    rows, columns = scores.shape
    whole = columns // 4 * 4
    groups = scores[:, :whole].reshape(rows, -1, 4)
    removed = torch.zeros_like(groups, dtype=torch.bool)
    removed.scatter_(2, groups.argsort(dim=2, stable=True)[:, :, :2], True)
    return torch.nn.functional.pad(removed.view(rows, whole), (0, columns - whole))


def sparsity_after(step: int, steps: int, start: float, end: float) -> float:
    """The share of zeros after step `step` of `steps`, from 1: it grows fast first (Zhu and Gupta, ICLR 2018
    workshop)."""
    return end + (start - end) * (1 - step / steps) ** 3


def _lowest(scores: Tensor, share: float) -> Tensor:
    removed = torch.zeros_like(scores, dtype=torch.bool)
    removed[scores.argsort(stable=True)[: round(share * len(scores))]] = True
    return removed
