"""Gates that are exactly 0 or 1 with some probability, and have a gradient all the same.

Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization" (ICLR 2018): with u uniform,
s = σ((log u - log(1 - u) + α) / β), stretched to (γ, ζ) and cut to [0, 1]. α (log α in the paper) is what is learned.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
"""β, γ and ζ of the paper."""


def sampled(alpha: Tensor, uniform: Tensor) -> Tensor:
    """Gates in [0, 1] for uniform random numbers in (0, 1), of the shape of both together (equations 10 and 11)."""
    noise = torch.log(uniform) - torch.log1p(-uniform)
    return _stretched(torch.sigmoid((noise + alpha) / BETA))


def open_probability(alpha: Tensor) -> Tensor:
    """The probability that a gate is not 0 (equation 12); its sum is the expected L0 norm."""
    return torch.sigmoid(alpha - BETA * log(-LOW / HIGH))


def settled(alpha: Tensor) -> Tensor:
    """The gates after training, without chance (equation 13)."""
    return _stretched(torch.sigmoid(alpha))


def _stretched(s: Tensor) -> Tensor:
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)
