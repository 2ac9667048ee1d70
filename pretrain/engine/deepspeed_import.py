"""Importing DeepSpeed without what it does beside: compiling an op, loading a compiler, talking."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from typing import Any

import torch


def import_deepspeed() -> Any:
    """DeepSpeed, without its chatter and without the op that it would compile on a CPU.

    On a CPU its communication backend builds a shared-memory op with a C++ compiler (about a minute,
    and an error where there is none). Only its inference all-reduce uses it.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    import deepspeed

    if not torch.cuda.is_available():
        from deepspeed.ops import __compatible_ops__  # tries a compiler for each op

        __compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer, as `initialize` will, without what its decorators would take with them.

    It calls torch.compile at its import, which loads the whole of Inductor: a second of a CPU at every start.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before
