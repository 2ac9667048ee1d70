"""fp16's dynamic loss scale, which DeepSpeed keeps in one object at stage 0 and in another at stages 1 to 3."""

from __future__ import annotations

from typing import Any

STATE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What makes up the state of DeepSpeed's own scaler (stages 1 to 3)."""


def loss_scale(deepspeed_engine: Any) -> float:
    """The scale now; 1 in other precisions."""
    torch_scaler = _torch_scaler(deepspeed_engine)
    if torch_scaler:
        return float(torch_scaler.get_scale())
    optimizer = deepspeed_engine.optimizer
    return float(getattr(optimizer, "cur_scale", getattr(optimizer, "loss_scale", 1.0)))


def scaler_state(deepspeed_engine: Any) -> dict[str, Any]:
    """The state as JSON values; empty in other precisions."""
    torch_scaler = _torch_scaler(deepspeed_engine)
    if torch_scaler:
        return dict(torch_scaler.state_dict())
    scaler = _dynamic_scaler(deepspeed_engine)
    return {key: getattr(scaler, key) for key in STATE_KEYS} if scaler else {}


def load_scaler_state(deepspeed_engine: Any, state: dict[str, Any]) -> None:
    """Take up a state. One that was saved in another precision or at another kind of stage is ignored."""
    torch_scaler = _torch_scaler(deepspeed_engine)
    if torch_scaler and "scale" in state:
        torch_scaler.load_state_dict(state)
    scaler = _dynamic_scaler(deepspeed_engine)
    if scaler and "cur_scale" in state:
        for key in STATE_KEYS:
            setattr(scaler, key, state[key])


def let_the_lowest_scale_overflow(deepspeed_engine: Any) -> None:
    """At the lowest scale DeepSpeed raises on an overflow. Here such a step counts as not finite and is skipped."""
    scaler = _dynamic_scaler(deepspeed_engine)
    if scaler:
        scaler.raise_error_at_min_scale = False


def _torch_scaler(deepspeed_engine: Any) -> Any:
    return getattr(deepspeed_engine, "torch_autocast_z0_gradscaler", None)


def _dynamic_scaler(deepspeed_engine: Any) -> Any:
    scaler = getattr(deepspeed_engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None
