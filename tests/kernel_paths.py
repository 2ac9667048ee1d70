"""The ways in which the operations of `sharebert.kernels` can run: tests of the whole model hold for each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

from sharebert import kernels

PATHS = ["reference"]
"""And "triton", where its kernels run: under its interpreter, if there is no GPU."""
if find_spec("triton") and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    PATHS.append("triton")


@contextmanager
def kernels_of(path: str) -> Iterator[None]:
    """Run all operations on one path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "triton_for", lambda x: kernels.load_triton() if path == "triton" else None)
        yield
