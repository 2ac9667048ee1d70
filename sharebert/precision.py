"""The dtype in which products run, and the dtype in which values are summed.

Products run in autocast's dtype where autocast is on. Sums are float32, and float64 for float64 values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which products with `tensor` run: autocast's where it is on, else the tensor's own."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] · b [k, n] in the dtype in which values of theirs are summed."""
    dtype = accumulation_dtype(a.dtype)
    if dtype == a.dtype or a.device.type == "cpu":
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)  # CUDA's products sum in float32: take that, unrounded


def accumulate_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [m, n] += a [m, k] · b [k, n]. It makes no temporary, except for a `total` of another dtype on a CPU."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cpu":
        total += a @ b
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [n] of the columns of x [m, n], in `dtype`; they are added up in float32 at least."""
    if x.device.type != "cpu":
        return x.sum(0, dtype=dtype)
    if x.dtype == accumulation_dtype(x.dtype):  # for float32 [512, 2048]: `sum(0)` took 8 ms, this takes 0.1 ms
        return torch.mv(x.t(), x.new_ones(len(x))).to(dtype)
    return x.sum(0).to(dtype)  # `sum(0, dtype=...)` would copy x; this rounds once
