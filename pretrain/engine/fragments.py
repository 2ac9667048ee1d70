"""Who holds what: the flat fp32 slices of weights and Adam moments that this rank owns, at every ZeRO stage.

DeepSpeed keeps the state differently at each stage; checkpoints do not. Here each layout becomes one
list of `Slice`, whose tensors are live views into the engine: a checkpoint copies out of them and into
them, and knows no stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.distributed import World, share_of

STATES = ("weight", "exp_avg", "exp_avg_sq")
"""The three fp32 tensors of a parameter: its weight, and Adam's first and second moment."""


@dataclass(frozen=True)
class Slice:
    """Elements `start` to `start + length` of the flattened parameter `name`, held by this rank."""

    name: str
    start: int
    length: int
    tensors: dict[str, torch.Tensor]
    """For each of STATES a live fp32 view [length] into the engine's own memory."""


def owned(engine: Any, world: World) -> list[Slice]:
    """The slices that this rank saves. Over all ranks they cover every element exactly once.

    Under ZeRO 1 and 2 a rank may own nothing of a parameter; its slice is then left out.
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


def loaded(engine: Any, world: World) -> list[Slice]:
    """The slices that this rank fills on a load: those it owns, and at stage 0, where all hold all, the whole."""
    if engine.zero_optimization_stage() == 0:
        create_moments(engine)
        return list(_stage_0(engine))
    return owned(engine, world)


def refresh_working_weights(engine: Any) -> None:
    """Bring the weights that the forward pass uses up to date with the masters. A collective."""
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def shapes(engine: Any) -> dict[str, list[int]]:
    """The full shape of every parameter, by name."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def adam_steps(engine: Any) -> int:
    """How many steps Adam has made: optimizer steps less those skipped."""
    create_moments(engine)
    states = [state for state in engine.basic_optimizer.state.values() if "step" in state]
    return max(int(state["step"]) for state in states)


def set_adam_steps(engine: Any, steps: int) -> None:
    """Let Adam's bias correction go on from `steps`."""
    create_moments(engine)
    for state in engine.basic_optimizer.state.values():
        state["step"].fill_(steps)


def _masters(engine: Any) -> list[torch.Tensor]:
    """The tensors that the basic optimizer steps: whole parameters at stage 0, else this rank's flat partitions."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]


def create_moments(engine: Any) -> None:
    """Adam makes its moments at its first step; a load and a save before it need them."""
    for master in _masters(engine):
        state = engine.basic_optimizer.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)


def _tensors(engine: Any, master: torch.Tensor, start: int, length: int) -> dict[str, torch.Tensor]:
    state = engine.basic_optimizer.state[master]
    flat = {"weight": master, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    return {key: tensor.detach().view(-1).narrow(0, start, length) for key, tensor in flat.items()}


def _narrow(whole: Slice, part: range) -> Slice:
    tensors = {key: tensor.narrow(0, part.start, len(part)) for key, tensor in whole.tensors.items()}
    return Slice(whole.name, whole.start + part.start, len(part), tensors)


def _stage_0(engine: Any) -> Iterator[Slice]:
    for name, p in engine.module.named_parameters():
        yield Slice(name, 0, p.numel(), _tensors(engine, p, 0, p.numel()))


def _stage_1_and_2(engine: Any) -> Iterator[Slice]:
    for name, p in engine.module.named_parameters():
        mapping = p._hp_mapping
        if mapping is not None:
            (master,) = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
            in_parameter, in_master = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            yield Slice(
                name, in_parameter.start, in_parameter.numel, _tensors(engine, master, in_master.start, in_master.numel)
            )


def _stage_3(engine: Any, world: World) -> Iterator[Slice]:
    """Every rank has an equal piece of every parameter; the last ones may be padded, or padding alone."""
    optimizer = engine.optimizer
    for name, p in engine.module.named_parameters():
        group, start, length = optimizer.grad_position[optimizer.get_param_id(p)]
        first = world.rank * length
        real = max(0, min(length, p.ds_numel - first))
        if real:
            master = optimizer.fp32_partitioned_groups_flat[group]
            yield Slice(name, first, real, _tensors(engine, master, start, real))
