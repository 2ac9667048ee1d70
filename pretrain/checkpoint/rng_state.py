"""The state of the random generators that dropout draws from."""

from __future__ import annotations

import torch


def rng_state() -> dict[str, torch.Tensor]:
    """The state of each generator now, uint8, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    """Continue from `states`. The state of a device that is not here is ignored."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
