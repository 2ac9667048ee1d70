"""Models without values: used for their shapes, or filled from a file afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _SkipNormal(TorchFunctionMode):
    """Skips `normal_`, which initialises an embedding.

    On the meta device there is nothing to fill, and torch 2.13 imports 886 modules (79 MB) to find that out.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") == "normal_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device: they have shapes, and take no memory."""
    with torch.device("meta"), _SkipNormal():
        yield
