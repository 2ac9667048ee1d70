"""Tensors of which many numbers are zero, or equal in a column: how an export stores and reads them.

A sparse tensor `name` is stored as

    name.mask      uint8, one bit a number, row by row, the lowest bit first: 1 where the number is in `values`
    name.values    numbers in their order, in the dtype of the tensor
    name.shape     int64 [dimensions]
    name.fill      [columns], the number of each column where the mask is 0; without it these are zero

which takes 1/32 of the bytes of fp32, and the numbers that are left. The number that a column fills with is its most
frequent one. `config.json` names these tensors in `sparse`. A
file that holds one of them whole is read as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .config import ShareBertError
from .packed import pack_bits, unpack_bits

PARTS = ("mask", "values", "shape")
"""What the name of a sparse tensor is followed by."""


def sparse_parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What a file holds of a sparse tensor [rows, columns]."""
    fill = tensor.mode(0).values
    kept = (tensor != fill).reshape(-1)
    shape = torch.tensor(tensor.shape, dtype=torch.int64)
    parts = {f"{name}.mask": pack_bits(kept, 1), f"{name}.values": tensor.reshape(-1)[kept], f"{name}.shape": shape}
    return parts | ({f"{name}.fill": fill} if fill.any() else {})


def expand_sparse(names: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of an export, with the sparse ones as they were.

    Args:
        names: the value of `sparse` in `config.json`.
        tensors: what the files hold.

    Raises ShareBertError, naming the tensor: something is missing, or of another size.
    """
    found = dict(tensors)
    for name in names:
        if f"{name}.mask" not in found:
            continue
        try:
            mask, values, size = (found.pop(f"{name}.{part}") for part in PARTS)
            shape = torch.Size(size.tolist())
            fill = found.pop(f"{name}.fill", values.new_zeros(1))
            flat = fill.expand(shape).reshape(-1).clone()
            flat[unpack_bits(mask, 1, shape.numel()).bool()] = values
        except (KeyError, IndexError, RuntimeError, ShareBertError) as error:
            raise ShareBertError(f"{name}: not the sparse tensor that config.json names ({error})") from error
        found[name] = flat.view(shape)
    return found
