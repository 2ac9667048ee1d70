"""Whether a compiler or an exporter is recording the model, which then must use plain operations only."""

from __future__ import annotations

import torch


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is running this code.

    They cannot record this project's autograd functions and kernels, and torch.compile fuses plain operations itself.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
