"""Whether a module still is what this project made, so that its weight may be read in place of a call.

Tools replace modules or their weights: adapters (PEFT), quantisers (bitsandbytes, torchao, torch.ao), offloading
(accelerate), parametrizations. Such a module must be called: its weight alone is not what it computes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PLAIN = (nn.Embedding, nn.Linear)


def is_plain(module: nn.Module) -> bool:
    """Whether `module` is an embedding or a linear map with an ordinary weight, and nothing has changed its forward."""
    if type(module) not in PLAIN or "forward" in module.__dict__:
        return False
    weight = module.weight  # quantisers put integers there, or a tensor that wraps others
    return isinstance(weight, Tensor) and weight.is_floating_point() and not hasattr(type(weight), "__tensor_flatten__")


def embedding_matrix(module: nn.Module, rows: int) -> Tensor:
    """The whole matrix [rows, F] that an embedding looks up: its weight, or its output for all ids."""
    if is_plain(module):
        return module.weight  # type: ignore[return-value]
    device = getattr(getattr(module, "weight", None), "device", None)
    if device is None or device.type == "meta":  # offloaded: its hook moves the ids
        device = torch.device("cpu")
    return module(torch.arange(rows, device=device))  # type: ignore[no-any-return]
