"""PC-LoRA on an encoder of Hugging Face: its linear layers fade out while low-rank products learn to take their place.

As `fading.py`, for models whose layers have matrices of their own: y = λ(n)·W·x + B·A·x + c for each `nn.Linear` inside
the layers of the encoder. At λ = 0 nothing of W is left, and two smaller `nn.Linear` compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibrate import Batch
from compress.low_rank.ranks import named_ranks
from compress.low_rank.svd import truncated
from sharebert.shared_linear import LowRank
from sharebert_common.errors import BadInput


class FadingLinear(nn.Module):
    """λ·(W - subtracted)·x + B·A·x + c. A, B and c are its parameters, W is fixed."""

    base: Tensor

    def __init__(self, linear: nn.Linear, product: LowRank, *, from_zero: bool) -> None:
        """`product`: A [in, r] and B [r, out]; `from_zero` as in `FadingMatrices`."""
        super().__init__()
        a, b = product
        matrix = linear.weight.detach().t()
        self.share = 1.0
        """λ."""
        self.register_buffer("base", matrix.clone() if from_zero else matrix - a @ b)
        self.a = nn.Parameter(a.clone())
        self.b = nn.Parameter(torch.zeros_like(b) if from_zero else b.clone())
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach().clone()
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]; at λ = 0 it is the product alone."""
        y = x @ self.a @ self.b + self.bias
        return y if self.share == 0 else y + self.share * (x @ self.base)

    def pair(self) -> nn.Sequential:
        """The product alone, as two `nn.Linear`."""
        (inputs, rank), outputs = self.a.shape, self.b.shape[1]
        found = nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs))
        values = (self.a.t(), self.b.t(), self.bias)
        with torch.no_grad():
            for parameter, value in zip(found.parameters(), values, strict=True):
                parameter.copy_(value)
        return found


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """The `nn.Linear` inside the layers of an encoder: those in lists of modules. A shared one comes once."""
    inside = _inside(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in found.items() if name.startswith(inside)}


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    """What is trained of a model after `fade`: A, B and all vectors (biases and norms) inside the layers."""
    factors = {id(p) for module in model.modules() if isinstance(module, FadingLinear) for p in module.parameters()}
    parameters = [p for name, p in model.named_parameters() if name.startswith(_inside(model))]
    return [p for p in parameters if p.dim() == 1 or id(p) in factors]


def _inside(model: nn.Module) -> tuple[str, ...]:
    """What the names of modules inside lists of modules begin with."""
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def ranks_of(linears: Mapping[str, nn.Linear], rank: int, ranks: Mapping[str, int], folder: object) -> dict[str, int]:
    """The rank of each matrix: that of the first pattern in `ranks` that its name fits, or `rank`.

    Raises BadInput: no matrix at all, a pattern that none fits, a rank that is not below the width.
    """
    if not linears:
        raise BadInput(f"pc_lora: {folder} has no linear layers inside a list of layers")
    widths = {name: min(linear.in_features, linear.out_features) for name, linear in linears.items()}
    named = named_ranks("pc_lora", widths, ranks, folder)
    for name, width in widths.items():
        if name not in named and rank >= width:
            raise BadInput(f"pc_lora.rank: {rank} is not below the width of {name}, {width}")
    return {name: named.get(name, rank) for name in widths}


def second_moments(
    model: nn.Module, linears: Mapping[str, nn.Linear], rows: Sequence[Batch], call: Callable[[nn.Module, Batch], Any]
) -> dict[str, Tensor]:
    """Σ x·xᵀ of what each matrix is multiplied by on the calibration rows, [in, in] float64, without padding."""
    found = {name: torch.zeros(linear.in_features, linear.in_features).double() for name, linear in linears.items()}
    watch_inputs(model, linears, rows, call, lambda name, x: found[name].addmm_(x.t(), x))
    return found


@torch.no_grad()
def watch_inputs(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    rows: Sequence[Batch],
    call: Callable[[nn.Module, Batch], Any],
    take: Callable[[str, Tensor], object],
) -> None:
    """Give `take` the name of each module and its input, [words, in] float64, batch by batch, without padding."""
    seen = torch.zeros(0)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(_: nn.Module, given: tuple[Tensor]) -> None:
            (x,) = given
            take(name, (x[seen] if x.shape[: seen.dim()] == seen.shape else x.flatten(0, -2)).double())

        return add

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    for batch in rows:
        seen = batch.visible.bool()
        call(model, batch)
    for hook in hooks:
        hook.remove()


def fade(
    model: nn.Module, ranks: Mapping[str, int], moments: Mapping[str, Tensor], *, from_zero: bool
) -> dict[str, FadingLinear]:
    """Put a `FadingLinear` of the given rank in the place of each named `nn.Linear`; they start from the truncated SVD
    that is nearest on calibration rows."""
    made = {}
    for name, rank in ranks.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        product = truncated(linear.weight.detach().t(), rank, moments[name])
        made[name] = FadingLinear(linear, product, from_zero=from_zero)
    put(model, made)
    return made


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the places that their names say."""
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)
