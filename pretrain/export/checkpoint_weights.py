"""The fp32 weights in a checkpoint of format 1, or their average, read a piece at a time."""

from __future__ import annotations

import json
from typing import Any

import torch

from exports.tensor_file import Spec
from pretrain.checkpoint.format import Checkpoint
from pretrain.engine.fragments import EMA, STATES
from sharebert_common.errors import BadInput


class CheckpointWeights:
    """The fp32 master weights in a checkpoint, of any ZeRO stage and world size; see `WeightSource`.

    With `ema`, their moving average instead. Raises BadInput where the checkpoint has none.
    """

    def __init__(self, checkpoint: Checkpoint, *, ema: bool = False) -> None:
        self.folder = checkpoint.folder
        if ema and not checkpoint.training.get("ema_steps"):
            raise BadInput(
                f"{self.folder}: has no average of the weights (--ema); train with optimizer.ema.decay, and past "
                "optimizer.ema.start"
            )
        self._state = EMA if ema else STATES[0]
        shapes: dict[str, list[int]] = checkpoint.manifest["shapes"]
        self.specs = {name: Spec(torch.float32, tuple(shape)) for name, shape in shapes.items()}
        self._pieces = checkpoint.pieces()
        self._weights: dict[str, dict[str, int]] = {}
        """For each file that was read: where the weights of a parameter begin, in bytes."""

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """See `WeightSource.read`. Raises BadInput where the checkpoint lacks some, or was deleted meanwhile."""
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
                    self._weights[file] = _offsets(opened, self._state)
                opened.seek(self._weights[file][name] + offset_bytes)
                read = opened.readinto(into)
        except FileNotFoundError as error:
            raise BadInput(
                f"{error.filename}: deleted while it was read; a run that is training deletes its old checkpoints "
                "(checkpoint.keep): start the consolidation again"
            ) from error
        if read != len(into):
            raise BadInput(f"{path}: cut short")


def _offsets(opened: Any, state: str) -> dict[str, int]:
    """For each parameter: where its `state` begins in the file of a rank, in bytes."""
    header_bytes = int.from_bytes(opened.read(8), "little")
    header = json.loads(opened.read(header_bytes))
    prefix = f"{state}/"
    return {
        key.removeprefix(prefix): 8 + header_bytes + entry["data_offsets"][0]
        for key, entry in header.items()
        if key.startswith(prefix)
    }
