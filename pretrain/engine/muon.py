"""Muon: what a recipe says about it, and the iteration that makes a matrix orthogonal.

`grouped_adamw` steps matrices that are parameters by Muon as published. `generated_muon` makes the gradients of
generated matrices orthogonal.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sharebert_common.recipe import STRICT

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, from Jordan et al."""

Scale = Literal["original", "match_rms_adamw"]
"""How large Muon's step of a matrix is; the names are those of `torch.optim.Muon`."""


@dataclass(config=STRICT, kw_only=True)
class MuonRecipe:
    """Muon on matrices that are parameters, and on the gradients of generated matrices."""

    matrices: bool = False
    """Step the matrices that are parameters (groups `matrices` and `factor_linear`) by Muon instead of AdamW (Jordan et
    al., "Muon", 2024). Not with zero.stage 3."""
    lr: Annotated[float, Field(gt=0)] = 0.02
    """Highest learning rate of the matrices that Muon steps; `schedule` acts on it as on optimizer.lr."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the matrices that Muon steps. Jordan et al. have none, Liu et al. ("Muon is scalable
    for LLM training", 2025) have 0.1."""
    scale: Scale = "original"
    """Size of the step of a matrix with `in` inputs and `out` outputs, as a multiple of the orthogonal matrix:
    sqrt(max(1, out/in)) for original (Jordan et al.), 0.2·sqrt(max(in, out)) for match_rms_adamw (Liu et al.), with
    which a learning rate of AdamW fits."""
    generated: bool = False
    """Make the gradient of each generated matrix orthogonal before it is carried on to E and W_all, where AdamW uses it
    (after Jordan et al., "Muon", 2024). Not with zero.stage 3 or fp16."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of the momentum of each matrix, which looks ahead as Nesterov's does."""
    gain: Annotated[float, Field(gt=0)] = 1.0
    """Norm of the orthogonal gradient of a generated matrix as a multiple of the norm of its gradient. On E, where the
    gradients of the input and of a tied head are added, it says how much those of the layers weigh."""
    iterations: Annotated[int, Field(ge=1, le=20)] = 5
    """Newton-Schulz iterations."""


def step_size(scale: Scale, inputs: int, outputs: int) -> float:
    """The step of a matrix as a multiple of the orthogonal matrix, see `MuonRecipe.scale`."""
    return math.sqrt(max(1, outputs / inputs)) if scale == "original" else 0.2 * math.sqrt(max(inputs, outputs))


def orthogonalise(matrix: Tensor, iterations: int) -> Tensor:
    """Nearly U·Vᵀ [m, n] of `matrix` = U·S·Vᵀ: all singular values come near 1, from about 0.7 to 1.2.

    In bf16 on CUDA as Jordan et al. do; in fp32 on a CPU, where it is as fast.
    """
    x = matrix.to(torch.bfloat16) if matrix.is_cuda else matrix.float()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.t()
    x = x / x.norm().clamp(min=1e-30)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.t()).to(matrix.dtype)
