"""The fp32 master weights in a folder that DeepSpeed's `engine.save_checkpoint` wrote, read without running pickles.

    FOLDER/latest  FOLDER/global_step7/…_model_states.pt  FOLDER/global_step7/…zero_pp_rank_0…_optim_states.pt …

The files are loaded with `weights_only=True`, and mapped: tensors stay on disk until they are read. The other
classes that their pickles name (`ALLOWED`) are replaced by an empty class. The layout is that of DeepSpeed 0.19.8:

- ZeRO 1 and 2: the parameters of a group lie one after another in a flat vector, which is cut into equal
  partitions, one for each rank;
- ZeRO 3: each rank has ceil(n / world size) elements of a parameter of n, padded at the end, one parameter after
  another in its flat groups;
- frozen parameters are not among them: they lie in the model states, in the dtype of the working weights;
- stage 0 in fp32: the model states hold the whole fp32 weights.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exports.tensor_file import Spec
from sharebert_common.errors import BadInput


class Ignored:
    """Takes the place of a DeepSpeed object: it accepts any arguments and state, and ignores them."""

    def __new__(cls, *_: Any, **__: Any) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


ALLOWED = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)
"""All classes that DeepSpeed's optimizer states name beside tensors and plain values; any other name is refused."""


@dataclass(frozen=True)
class Fragment:
    """Elements from `start` on of a flattened parameter, in a flat tensor of a file."""

    start: int
    values: Tensor


def is_deepspeed_folder(folder: Path) -> bool:
    """Whether `folder` looks like a folder that DeepSpeed saved, or like one of its tags."""
    return any(folder.glob("*_model_states.pt")) or any(folder.glob("*/*_model_states.pt"))


class DeepSpeedWeights:
    """The fp32 master weights in a folder that DeepSpeed saved; see `WeightSource`.

    Raises BadInput, naming the file: something missing, damaged, or without fp32 weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = _tag_folder(folder)
        model = _load(_model_files(self.folder)[0])
        self.step = int(model.get("global_steps") or 0)
        """Optimizer steps, as DeepSpeed counts them."""
        if model.get("mp_world_size", 1) != 1:
            raise BadInput(f"{self.folder}: {model['mp_world_size']} tensor-parallel ranks; only 1 is supported")
        self.specs: dict[str, Spec] = {}
        self._fragments: dict[str, list[Fragment]] = {}
        if not model.get("param_shapes"):
            self._take_stage_0(model)
            return
        states = [_load(path)["optimizer_state_dict"] for path in _optimizer_files(self.folder)]
        world_size = model.get("dp_world_size", len(states))
        if len(states) != world_size:
            found = f"{len(states)} files *_optim_states.pt of {world_size}"
            raise BadInput(f"{self.folder}: {found}; did all ranks finish?")
        if "fp32_flat_groups" in states[0]:
            self._take_stage_3(model, states)
        elif "single_partition_of_fp32_groups" in states[0]:
            self._take_stages_1_and_2(model, states)
        else:
            raise BadInput(f"{self.folder}: its *_optim_states.pt hold no fp32 weights (neither ZeRO 1, 2 nor 3)")

    def read(self, name: str, first: int, count: int) -> Tensor:
        """See `WeightSource.read`."""
        values = torch.empty(count, dtype=torch.float32)
        for part in self._fragments[name]:
            begin = max(part.start, first)
            end = min(part.start + part.values.numel(), first + count)
            if begin < end:
                values[begin - first : end - first] = part.values[begin - part.start : end - part.start]
        return values

    def _add(self, name: str, shape: Sequence[int], fragments: Iterator[Fragment]) -> None:
        found, expected = list(fragments), math.prod(shape)
        held = sum(part.values.numel() for part in found)
        if held != expected:
            raise BadInput(f"{self.folder}: holds {held} of the {expected} elements of '{name}'")
        self.specs[name], self._fragments[name] = Spec(torch.float32, tuple(shape)), found

    def _take_stage_0(self, model: dict[str, Any]) -> None:
        for name, tensor in model["module"].items():
            if tensor.dtype != torch.float32:
                raise BadInput(
                    f"{self.folder}: '{name}' is {str(tensor.dtype).removeprefix('torch.')}, and there are no fp32 "
                    "weights beside it (ZeRO stage 0)"
                )
            self._add(name, tensor.shape, iter([Fragment(0, tensor.reshape(-1))]))

    def _take_stages_1_and_2(self, model: dict[str, Any], states: list[dict[str, Any]]) -> None:
        for group, shapes in enumerate(model["param_shapes"]):
            partitions = [state["single_partition_of_fp32_groups"][group] for state in states]
            paddings = (states[0].get("param_alignment_paddings") or [[0] * len(shapes)] * (group + 1))[group]
            offset = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                self._add(name, shape, _cut(partitions, offset, math.prod(shape)))
                offset += math.prod(shape) + padding
        for name, tensor in model["module"].items():
            if name not in self.specs:  # frozen
                self._add(name, tensor.shape, iter([Fragment(0, tensor.reshape(-1))]))

    def _take_stage_3(self, model: dict[str, Any], states: list[dict[str, Any]]) -> None:
        world_size, offset = len(states), 0
        for shapes in model["param_shapes"]:
            for name, shape in shapes.items():
                length = -(-math.prod(shape) // world_size)
                of_ranks = [list(_cut(state["fp32_flat_groups"], offset, length)) for state in states]
                self._add(name, shape, _joined(of_ranks, length, math.prod(shape)))
                offset += length
        frozen = model.get("frozen_param_shapes") or {}
        if frozen:
            models = [_load(path) for path in _model_files(self.folder)]
            for name, shape in frozen.items():
                held = [[Fragment(0, m["frozen_param_fragments"][name].reshape(-1))] for m in models]
                length = held[0][0].values.numel()
                self._add(name, shape, _joined(held, length, math.prod(shape)))


def _cut(vectors: Sequence[Tensor], offset: int, count: int) -> Iterator[Fragment]:
    """Elements `offset` to `offset + count` of the concatenated vectors, as far as there are any."""
    ends = accumulate(vector.numel() for vector in vectors)
    for vector, end in zip(vectors, ends, strict=True):
        first = end - vector.numel()
        begin, stop = max(first, offset), min(end, offset + count)
        if begin < stop:
            yield Fragment(begin - offset, vector.reshape(-1)[begin - first : stop - first])


def _joined(of_ranks: Sequence[Sequence[Fragment]], length: int, count: int) -> Iterator[Fragment]:
    """The fragments of a parameter of `count` elements, of which each rank has `length`, the last of them padding."""
    for rank, fragments in enumerate(of_ranks):
        for part in fragments:
            start = rank * length + part.start
            real = min(part.values.numel(), count - start)
            if real > 0:
                yield Fragment(start, part.values[:real])


def _tag_folder(folder: Path) -> Path:
    """The folder of the tag that `latest` names; `folder` itself if it is the folder of a tag."""
    if any(folder.glob("*_model_states.pt")):
        return folder
    latest = folder / "latest"
    if not latest.is_file():
        raise BadInput(f"{latest}: missing; give the folder of one tag")
    found = folder / latest.read_text(encoding="utf-8").strip()
    if not any(found.glob("*_model_states.pt")):
        raise BadInput(f"{found}: no *_model_states.pt there, but {latest} names this folder")
    return found


def _rank(path: Path) -> int:
    return int(path.name.partition("zero_pp_rank_")[2].partition("_")[0] or 0)


def _optimizer_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_optim_states.pt"), key=_rank)


def _model_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_model_states.pt"), key=_rank)


def _load(path: Path) -> dict[str, Any]:
    stand_ins: list[Any] = [(type(name.rpartition(".")[2], (Ignored,), {}), name) for name in ALLOWED]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except pickle.UnpicklingError as error:
        first = str(error).partition("\n")[0]
        raise BadInput(f"{path}: holds more than tensors, or is damaged; it is not run ({first})") from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"{path}: not readable as a PyTorch file ({reason}): damaged, or cut short") from error
