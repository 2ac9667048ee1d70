"""Who holds what: the flat fp32 fragments of weights and moments that this rank owns, at every ZeRO stage.

DeepSpeed keeps the state differently at each stage; checkpoints do not. Here each layout becomes one list of
`Fragment`, whose tensors are live views into DeepSpeed's memory. A checkpoint copies out of them and into them, and
knows no stage.

`DeepSpeedEngine` below is DeepSpeed's own; the rest of the project uses `pretrain.engine.engine.Engine`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.distributed import World, share_of

DeepSpeedEngine = Any

STATES = ("weight", "exp_avg", "exp_avg_sq")
"""The three fp32 tensors of a parameter: its weight, and Adam's first and second moment."""

MOMENTUM = "momentum"
"""The fp32 tensor of a generated matrix that has a momentum. A parameter that Muon steps has it in place of moments."""

EMA = "ema"
"""The fp32 tensor of a parameter that is the average of its weights, where a run keeps one."""

ALL_STATES = (*STATES, MOMENTUM, EMA)


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + length` of the flattened parameter `name`, held by this rank."""

    name: str
    start: int
    length: int
    tensors: dict[str, torch.Tensor]
    """Some of ALL_STATES, by name: live fp32 views [length] into the engine's own memory. A generated matrix has
    MOMENTUM alone."""

    def overlap(self, start: int, length: int) -> range:
        """Which elements of the flattened parameter are in this fragment and in [start, start + length) too."""
        return range(max(start, self.start), min(start + length, self.start + self.length))


def owned(engine: DeepSpeedEngine, world: World) -> list[Fragment]:
    """The fragments that this rank saves. Over all ranks they cover every element exactly once.

    Under ZeRO 1 and 2 a rank may own nothing of a parameter, which then has no fragment here.
    """
    stage = engine.zero_optimization_stage()
    create_moments(engine)
    if stage == 0:
        return [
            _narrow(whole, share_of(whole.length, world.rank, world.world_size))
            for whole in _stage_0(engine)
            if whole.length
        ]
    return list(_stage_3(engine, world) if stage == 3 else _stage_1_and_2(engine))


def writable(engine: DeepSpeedEngine, world: World) -> list[Fragment]:
    """The fragments that this rank fills on a load: those it owns; at stage 0, where all ranks hold all, everything."""
    if engine.zero_optimization_stage() == 0:
        create_moments(engine)
        return list(_stage_0(engine))
    return owned(engine, world)


def refresh_working_weights(engine: DeepSpeedEngine) -> None:
    """Bring the weights that the forward pass uses up to date with the masters. A collective."""
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if small := optimizer.persistent_parameters:
            small[0].partition(small)  # else those that are whole already stay as they are
            small[0].all_gather(small)


def shapes(engine: DeepSpeedEngine) -> dict[str, list[int]]:
    """The full shape of every parameter, by name."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def adam_steps(engine: DeepSpeedEngine) -> int:
    """How many steps Adam has made: optimizer steps less those skipped."""
    create_moments(engine)
    states = [state for state in engine.basic_optimizer.state.values() if "step" in state]
    return max(int(state["step"]) for state in states)


def set_adam_steps(engine: DeepSpeedEngine, steps: int) -> None:
    """Let Adam's bias correction continue from `steps`."""
    create_moments(engine)
    for state in engine.basic_optimizer.state.values():
        if "step" in state:
            state["step"].fill_(steps)


def masters(engine: DeepSpeedEngine) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Each fp32 tensor of weights that this rank updates, and the optimizer's state of it, with the moments."""
    create_moments(engine)
    for master in _masters(engine):
        yield master, engine.basic_optimizer.state[master]


def create_moments(engine: DeepSpeedEngine) -> None:
    """Make the moments now. The optimizer makes them at its first step, but a load or a save before that needs them."""
    by_muon = {id(p) for group in engine.basic_optimizer.param_groups if group.get("matrices") for p in group["params"]}
    for master in _masters(engine):
        state = engine.basic_optimizer.state[master]
        if not state and id(master) in by_muon:
            state[MOMENTUM] = torch.zeros_like(master)
        elif not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)


def _masters(engine: DeepSpeedEngine) -> list[torch.Tensor]:
    """The tensors that the optimizer updates: whole parameters at stage 0, else this rank's flat partitions."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]


def _tensors(engine: DeepSpeedEngine, master: torch.Tensor, start: int, length: int) -> dict[str, torch.Tensor]:
    state = engine.basic_optimizer.state[master]
    flat = {"weight": master} | {key: state[key] for key in ALL_STATES if key in state}
    return {key: tensor.detach().view(-1).narrow(0, start, length) for key, tensor in flat.items()}


def _narrow(whole: Fragment, part: range) -> Fragment:
    tensors = {key: tensor.narrow(0, part.start, len(part)) for key, tensor in whole.tensors.items()}
    return Fragment(whole.name, whole.start + part.start, len(part), tensors)


def _stage_0(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    for name, p in engine.module.named_parameters():
        yield Fragment(name, 0, p.numel(), _tensors(engine, p, 0, p.numel()))


def _stage_1_and_2(engine: DeepSpeedEngine) -> Iterator[Fragment]:
    for name, p in engine.module.named_parameters():
        mapping = p._hp_mapping
        if mapping is not None:
            (master,) = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
            in_parameter, in_master = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            tensors = _tensors(engine, master, in_master.start, in_master.numel)
            yield Fragment(name, in_parameter.start, in_parameter.numel, tensors)


def _stage_3(engine: DeepSpeedEngine, world: World) -> Iterator[Fragment]:
    """Every rank has an equal piece of every parameter; the last pieces may be padded, or padding alone."""
    optimizer = engine.optimizer
    for name, p in engine.module.named_parameters():
        group, start, length = optimizer.grad_position[optimizer.get_param_id(p)]
        first = world.rank * length
        real = max(0, min(length, p.ds_numel - first))
        if real:
            master = optimizer.fp32_partitioned_groups_flat[group]
            yield Fragment(name, first, real, _tensors(engine, master, start, real))
