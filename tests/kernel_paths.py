"""The implementations of `sharebert.kernels` that can run here; tests of the whole model run on each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

from sharebert import kernels, virtual

PATHS = ["reference"]
"""And "triton" if its kernels can run: on a GPU, or under Triton's interpreter."""
if find_spec("triton") and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    PATHS.append("triton")


@contextmanager
def kernels_of(path: str) -> Iterator[None]:
    """Run all operations with one implementation."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (kernels, virtual):
            patch.setattr(module, "triton_for", lambda x: kernels.load_triton() if path == "triton" else None)
        yield
