"""The fp32 master weights of a training, wherever they lie, read a piece at a time.

A consolidation streams from these: no source holds a model in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from exports.weights import read_weights
from pretrain.checkpoint.format import Checkpoint
from sharebert_common.errors import BadInput

PIECE_ELEMENTS = 1 << 20
"""Values that are read at once: 4 MiB, so that they are still in the processor's cache when they are written."""


class Masters(Protocol):
    """Named fp32 tensors that can be read in part."""

    @property
    def shapes(self) -> Mapping[str, Sequence[int]]:
        """The shape of every tensor."""

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Elements `first` to `first + count` of the flattened tensor `name`, [count]."""


def pieces(masters: Masters, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The values of `names` in order, in flat pieces: (name, values)."""
    for name in names:
        elements = math.prod(masters.shapes[name])
        for first in range(0, elements, PIECE_ELEMENTS):
            yield name, masters.read(name, first, min(PIECE_ELEMENTS, elements - first))


class CheckpointMasters:
    """The masters in a checkpoint of format 1, of any ZeRO stage and number of ranks."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder = checkpoint.folder
        self.shapes: dict[str, list[int]] = checkpoint.manifest["shapes"]
        self._pieces = checkpoint.pieces()
        self._weights: dict[str, dict[str, int]] = {}
        """For each file that was read from, where the weights of a parameter begin, in bytes."""

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """As `Masters.read`. Raises BadInput where the checkpoint lacks some, or went away meanwhile."""
        values = torch.empty(count, dtype=torch.float32)
        into = values.numpy()
        filled = 0
        for file, start, length in self._pieces.get(name, []):
            begin, end = max(start, first), min(start + length, first + count)
            if begin < end:
                self._read_into(into[begin - first : end - first].data.cast("B"), file, name, (begin - start) * 4)
                filled += end - begin
        if filled != count:
            raise BadInput(
                f"{self.folder}: holds {filled} of the {count} elements of '{name}' from {first} on; "
                "was it made with another model?"
            )
        return values

    def _read_into(self, into: memoryview, file: str, name: str, offset_bytes: int) -> None:
        path = self.folder / file
        try:
            with path.open("rb", buffering=0) as opened:
                if file not in self._weights:
                    self._weights[file] = _offsets(opened)
                opened.seek(self._weights[file][name] + offset_bytes)
                read = opened.readinto(into)
        except FileNotFoundError as error:
            raise BadInput(
                f"{error.filename}: went away while it was read; a run that goes on deletes its old checkpoints "
                "(checkpoint.keep): start again"
            ) from error
        if read != len(into):
            raise BadInput(f"{path}: cut short")


def _offsets(opened: Any) -> dict[str, int]:
    """For each parameter, where its weights begin in a rank's file."""
    header_bytes = int.from_bytes(opened.read(8), "little")
    header = json.loads(opened.read(header_bytes))
    prefix = "weight/"
    return {
        key.removeprefix(prefix): 8 + header_bytes + entry["data_offsets"][0]
        for key, entry in header.items()
        if key.startswith(prefix)
    }


class ExportMasters:
    """The weights of an export, in float32. They are mapped from its files, which their checksums must fit."""

    def __init__(self, folder: Path) -> None:
        self._tensors = read_weights(folder)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """As `Masters.read`."""
        return self._tensors[name].view(-1)[first : first + count].float()


class Mean:
    """The mean of several masters of one model, summed in float64."""

    def __init__(self, masters: Sequence[Masters]) -> None:
        self.masters = masters
        self.shapes = masters[0].shapes

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """As `Masters.read`."""
        total = torch.zeros(count, dtype=torch.float64)
        for masters in self.masters:
            total += masters.read(name, first, count)
        return (total / len(self.masters)).float()
