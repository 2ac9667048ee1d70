"""The layout `pack-quantized` of compressed-tensors, which transformers reads where that package is installed.

A matrix `name` [out, in] of b bits is stored as

    name.weight_packed       int32 [out, in·b/32], codes + 2^(b-1) as a stream of bits, the lowest bit first
    name.weight_scale        float16 [out, groups]
    name.weight_shape        int64 [2], out and in

and `quantization_config` in `config.json` says bits and groups. Source: compressed-tensors, the class
`PackedQuantizationCompressor`. Codes are symmetric: with zero points, transformers 5.23 and compressed-tensors 0.20
refuse the file, because the model that they prepare for it has zero points that are not packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.dense.awq_search import Codes, Grid
from sharebert.packed import pack_bits, unpack_bits

PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
WORD = 32


def stored(name: str, codes: Codes, grid: Grid) -> dict[str, Tensor]:
    """The tensors of a matrix in the file; `name` is without `.weight`."""
    return {
        name + PACKED: _packed_rows(codes.codes, grid.bits),
        name + SCALE: codes.scales.half(),
        name + SHAPE: torch.tensor(codes.codes.shape),
    }


def quantization_config(targets: list[str], grid: Grid) -> dict[str, Any]:
    """The value of `quantization_config` in `config.json`; `targets` are names of modules, or `re:` and a pattern."""
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": grid.group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": targets, "weights": weights}},
        "ignore": [],
    }


def unpacked(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a model, its packed matrices as float32 under their names with `.weight`.

    Args:
        config: what `config.json` holds.
        tensors: what the file holds. One without packed matrices is returned as it is.
    """
    names = [name.removesuffix(PACKED) for name in tensors if name.endswith(PACKED)]
    parts = {name + part for name in names for part in (PACKED, SCALE, SHAPE)}
    found = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name in names:
        bits = config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"]
        _, columns = tensors[name + SHAPE].tolist()
        codes = _unpacked_rows(tensors[name + PACKED], bits, columns)
        found[f"{name}.weight"] = Codes(codes, tensors[name + SCALE]).values()
    return found


def _packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Signed codes [rows, columns] as int32 [rows, words]; each row begins with a new word."""
    rows, columns = codes.shape
    padded = F.pad(codes.to(torch.int16) + 2 ** (bits - 1), (0, -columns % WORD))
    words = pack_bits(padded, bits).view(torch.int32).view(rows, -1)
    return words[:, : -(-columns * bits // WORD)].contiguous()


def _unpacked_rows(words: Tensor, bits: int, columns: int) -> Tensor:
    """Signed codes [rows, columns] int8."""
    padded = -(-columns // WORD) * WORD
    whole = F.pad(words, (0, padded * bits // WORD - words.shape[1])).contiguous()
    codes = unpack_bits(whole.view(torch.uint8).view(-1), bits, len(words) * padded)
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8).view(len(words), padded)[:, :columns]
