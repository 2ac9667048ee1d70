"""The layout of a safetensors file, computed before its tensors are there.

The safetensors library writes a file from tensors that are all in memory. Here the header comes first. So a
checkpoint of a training copies the engine's state straight into one buffer, which is the file, and an export of
any size is written piece by piece.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Spec(NamedTuple):
    """Dtype and shape of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in a file."""

    header: bytes
    spans: dict[str, tuple[int, int]]
    """First byte of each tensor and the byte after its last, counted from the start of the file."""
    specs: dict[str, Spec]

    @property
    def total_bytes(self) -> int:
        """Size of the whole file."""
        return max((end for _, end in self.spans.values()), default=len(self.header))

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors as typed views into `buffer`, uint8 [total_bytes]."""
        return {
            name: buffer[begin:end].view(self.specs[name].dtype).view(self.specs[name].shape)
            for name, (begin, end) in self.spans.items()
        }


def lay_out(
    specs: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> Layout:
    """The layout of tensors of the given dtypes and shapes, one after another in the given order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    ends: dict[str, tuple[int, int]] = {}
    for name, (dtype, shape) in specs.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        ends[name] = (offset, end)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    return Layout(
        header=prefix,
        spans={name: (len(prefix) + begin, len(prefix) + end) for name, (begin, end) in ends.items()},
        specs={name: Spec(dtype, tuple(shape)) for name, (dtype, shape) in specs.items()},
    )
