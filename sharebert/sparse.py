"""Tensors of which many numbers are zero: how an export stores them, and how they are read again.

A sparse tensor `name` is stored as

    name.mask      uint8, one bit a number, row by row, the lowest bit first: 1 where the number is not zero
    name.values    the numbers that are not zero, in their order, in the dtype of the tensor
    name.shape     int64 [dimensions]

which takes 1/32 of the bytes of fp32, and the numbers that are left. `config.json` names these tensors in `sparse`. A
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
    """What a file holds of a sparse tensor."""
    flat = tensor.reshape(-1)
    kept = flat != 0
    shape = torch.tensor(tensor.shape, dtype=torch.int64)
    return {f"{name}.mask": pack_bits(kept, 1), f"{name}.values": flat[kept], f"{name}.shape": shape}


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
            flat = values.new_zeros(shape.numel())
            flat[unpack_bits(mask, 1, shape.numel()).bool()] = values
        except (KeyError, IndexError, RuntimeError, ShareBertError) as error:
            raise ShareBertError(f"{name}: not the sparse tensor that config.json names ({error})") from error
        found[name] = flat.view(shape)
    return found
