"""The random generators that dropout draws from."""

from __future__ import annotations

import torch


def generators() -> dict[str, torch.Tensor]:
    """Their states now, uint8, by device type."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states: dict[str, torch.Tensor]) -> None:
    """Go on from `states`; those of a device that is not here are left aside."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
