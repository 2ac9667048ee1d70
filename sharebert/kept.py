"""Generated matrices that are kept between forward passes of an evaluation.

They are made again when a tensor that they are made from has changed: another tensor, another memory, or a newer
version counter, which in-place operations of PyTorch raise; and after a step of any optimizer. What this cannot notice
is a write past the version counter: `p.data.copy_(…)`, `p.data += …`, a write through numpy, or a kernel of a library
that writes to memory. After such a write in evaluation mode, call `ShareBert.forget_weights()`. `train()`,
`load_state_dict`, moves and the replacement of a module of the encoder (as adapters do it) call it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

Make = Callable[[int, int], Sequence[Tensor]]
"""Makes the matrices with the numbers [first, last)."""


class _Seen(NamedTuple):
    """A tensor as it was when the matrices were made."""

    tensor: weakref.ref[Tensor]
    memory: Tensor
    """Keeps the tensor's memory, so that no other tensor can come to lie at the same address."""
    version: int

    def is_still(self, tensor: Tensor) -> bool:
        was = self.memory
        return (
            self.tensor() is tensor
            and tensor.data_ptr() == was.data_ptr()
            and tensor._version == self.version
            and (tensor.dtype, tensor.shape, tensor.stride()) == (was.dtype, was.shape, was.stride())
        )


_optimizer_steps = [0]


def _count_step(*_: Any) -> None:
    _optimizer_steps[0] += 1


register_optimizer_step_post_hook(_count_step)


class _Entry(NamedTuple):
    seen: tuple[_Seen, ...]
    optimizer_steps: int
    """Steps of all optimizers until then: PyTorch's fused optimizers do not raise version counters."""
    dtype: torch.dtype
    matrices: tuple[Tensor, ...]


class KeptMatrices:
    """The matrices of the last forward pass in evaluation. A copy of this object, and its pickle, is empty.

    One attribute holds all of them and is replaced as a whole, so that threads may run the model at once: at worst,
    two of them make the same matrices.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def forget(self) -> None:
        """Drop the matrices, and their memory."""
        if self._entry is not None:
            self._entry = None

    def get(self, sources: Sequence[Tensor], dtype: torch.dtype, count: int, make: Make) -> Sequence[Tensor]:
        """The first `count` matrices that are made from `sources` in `dtype`; what is not kept yet is made.

        The caller has checked `may_keep(sources)`.
        """
        entry = self._entry
        steps = _optimizer_steps[0]
        if (
            entry is None
            or entry.dtype != dtype
            or entry.optimizer_steps != steps
            or not _all_still(entry.seen, sources)
        ):
            # not dropped before: its memory is reused, but another thread may read it
            seen = tuple(_Seen(weakref.ref(t), t.detach(), t._version) for t in sources)
            entry = _Entry(seen, steps, dtype, ())
        if len(entry.matrices) < count:
            # normal tensors also where inference mode is on, because a later pass may save them for a gradient
            with torch.inference_mode(False), torch.no_grad():
                made = tuple(make(len(entry.matrices), count))
            entry = entry._replace(matrices=(*entry.matrices, *made))
            if all(type(matrix) is Tensor for matrix in made):  # not the fakes of a mode that only looks at shapes
                self._entry = entry
        return entry.matrices[:count]

    def __deepcopy__(self, memo: Any) -> KeptMatrices:
        return KeptMatrices()

    def __reduce__(self) -> tuple[type[KeptMatrices], tuple[()]]:
        return KeptMatrices, ()


def may_keep(sources: Sequence[Tensor]) -> bool:
    """Whether what is made from `sources` now may be used again in a later forward pass: no gradient is needed, and a
    change of the tensors can be noticed."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sources):
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False  # a replay of the graph must see the weights of that time
    return all(_is_watchable(tensor) for tensor in sources)


def _is_watchable(tensor: Tensor) -> bool:
    """Not an inference tensor (it has no version counter), not the piece of a weight that DeepSpeed's ZeRO 3 gathers
    for each forward pass, and no wrapper without memory of its own."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_inference() or hasattr(tensor, "ds_id"):
        return False
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:  # a tensor inside torch.func's transforms
        return False


def _all_still(seen: Sequence[_Seen], sources: Sequence[Tensor]) -> bool:
    return len(seen) == len(sources) and all(one.is_still(tensor) for one, tensor in zip(seen, sources, strict=True))
