"""The model under DeepSpeed: forward, backward and optimizer step, and the state that a checkpoint holds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import distributed
from pretrain.distributed import World
from pretrain.engine import fragments
from pretrain.engine.deepspeed_import import import_deepspeed
from pretrain.engine.ema import WeightAverage
from pretrain.engine.fragments import Fragment
from pretrain.engine.generated_muon import GeneratedMuon
from pretrain.engine.grouped_adamw import GroupedAdamW
from pretrain.engine.loss_scaler import (
    let_the_lowest_scale_overflow,
    load_scaler_state,
    loss_scale,
    scaler_state,
)
from pretrain.engine.muon import MuonRecipe
from pretrain.engine.optimizer import OptimizerRecipe, make_optimizer

COUNTERS = ("skipped_steps", "global_steps", "global_samples")
"""DeepSpeed's counters of what was trained."""


class Engine:
    """A model with its optimizer, under any ZeRO stage and precision. `open_engine` makes one.

    Everything that DeepSpeed names privately stays in this folder.
    """

    def __init__(
        self,
        deepspeed_engine: Any,
        clip: float,
        muon: GeneratedMuon | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        """`clip` is the highest norm of the whole gradient; 0 does not clip."""
        self._muon, self._average = muon, average
        self._learning_rate = 0.0
        self._deepspeed = deepspeed_engine
        self._clip = clip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the model, with hooks that ZeRO 3 needs. A collective under ZeRO 3."""
        return self._deepspeed(*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        """The model. Under ZeRO 3 its parameters hold this rank's part alone."""
        return self._deepspeed.module  # type: ignore[no-any-return]

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self._deepspeed.zero_optimization_stage())

    def train(self) -> None:
        """Dropout is on from now on."""
        self._deepspeed.train()

    def eval(self) -> None:
        """Dropout is off from now on."""
        self._deepspeed.eval()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the scalar `loss` of a micro-batch. DeepSpeed averages gradients over the ranks."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self) -> bool:
        """End a micro-batch. After the last one of an optimizer step the optimizer updates the weights.

        Returns whether that update was skipped, on all ranks alike, because the gradient is not finite: weights and
        moments are as before. ZeRO 1, 2 and 3 do so by themselves. At stage 0 DeepSpeed clips, but keeps the norm to
        itself and never looks at it; here it is computed once, for both.
        """
        skipped_before = self.skipped_steps
        last = self._deepspeed.is_gradient_accumulation_boundary()
        if self.stage == 0 and last:
            self._clip_at_stage_0()
        self._deepspeed.step()
        skipped = self.skipped_steps > skipped_before
        if self._muon is not None and last:
            self._muon.end_step(skipped=skipped)
        if self._average is not None and last and not skipped:
            self._average.add(self._deepspeed.global_steps)
        return skipped

    def _clip_at_stage_0(self) -> None:
        engine = self._deepspeed
        if engine.torch_autocast_z0_gradscaler:
            engine.torch_autocast_z0_gradscaler.unscale_(engine.optimizer)
        for parameter in engine.module.parameters():
            if parameter.grad is None:  # the pooler's; where ranks add up their gradients, DeepSpeed does the same
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), self._clip or math.inf)
        if not torch.isfinite(norm):
            norm.fill_(math.inf)
            engine.zero_grad()  # Adam leaves parameters without a gradient alone
            engine.skipped_steps += 1
        engine._global_grad_norm = norm

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last optimizer step; set, it holds from the next one on. Groups may have a multiple
        of it."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, lr: float) -> None:
        self._learning_rate = lr
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)

    @property
    def gradient_norm(self) -> float:
        """Norm of the whole gradient of the last optimizer step, before clipping; infinite where it was skipped."""
        return float(self._deepspeed.get_global_grad_norm())

    @property
    def loss_scale(self) -> float:
        """fp16's loss scale; 1 in other precisions."""
        return loss_scale(self._deepspeed)

    @property
    def loss_scale_can_fall(self) -> bool:
        """Whether a skipped step may be fp16's search for a loss scale, and no fault."""
        return self.loss_scale > 1.0

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped since step 0."""
        return int(self._deepspeed.skipped_steps)

    def fragments(self, world: World) -> list[Fragment]:
        """What this rank saves: over all ranks, every element of weights and moments exactly once. Live views."""
        return fragments.owned(self._deepspeed, world) + (self._muon.owned(world) if self._muon else [])

    def writable_fragments(self, world: World) -> list[Fragment]:
        """What this rank fills on a load, before `load_state`. Live views."""
        return fragments.writable(self._deepspeed, world) + (self._muon.writable() if self._muon else [])

    def shapes(self) -> dict[str, list[int]]:
        """The full shape of every parameter, by name."""
        return fragments.shapes(self._deepspeed)

    def state(self) -> dict[str, Any]:
        """The state beside the fragments, as JSON values, the same on every rank."""
        return {
            "adam_steps": fragments.adam_steps(self._deepspeed),
            "scaler": scaler_state(self._deepspeed),
            "skipped": self.skipped_steps,
            **({"ema_steps": self._average.steps} if self._average else {}),
        }

    def load_state(self, step: int, state: dict[str, Any]) -> None:
        """Continue after optimizer step `step` with `state` and the fragments as they are now. A collective."""
        fragments.refresh_working_weights(self._deepspeed)
        fragments.set_adam_steps(self._deepspeed, state["adam_steps"])
        load_scaler_state(self._deepspeed, state["scaler"])
        self._deepspeed.skipped_steps = state["skipped"]
        self._deepspeed.global_steps = step
        if self._average:
            self._average.steps = state.get("ema_steps", 0)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[bool]:
        """Inside, the weights are their moving average, where there is one and it has begun; gives whether they are. A
        collective."""
        if self._average is None or not self._average.steps:
            yield False
            return
        self._swap(self._average)
        try:
            yield True
        finally:
            self._swap(self._average)

    def _swap(self, average: WeightAverage) -> None:
        average.swap()
        fragments.refresh_working_weights(self._deepspeed)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Steps made inside do not count, nor do they move the loss scale. They must change no weight.

        Where the block raises, nothing is put back.
        """
        engine = self._deepspeed
        counters, scaler = {name: getattr(engine, name) for name in COUNTERS}, scaler_state(engine)
        fragments.create_moments(engine)
        yield
        for name, value in counters.items():
            setattr(engine, name, value)
        load_scaler_state(engine, scaler)


def open_engine(
    model: nn.Module, config: dict[str, Any], optimizer: OptimizerRecipe, timeout_s: float | None = None
) -> Engine:
    """Put `model` under DeepSpeed. The process group must exist; a collective.

    Args:
        model: on the CPU; DeepSpeed moves it to the device.
        config: of `deepspeed_config`.
        optimizer: its settings.
        timeout_s: a collective that some rank does not join for this long fails, in DeepSpeed's own groups too; None
            leaves torch's 30 minutes.
    """
    deepspeed = import_deepspeed()
    stage = config["zero_optimization"]["stage"]
    adamw = make_optimizer(model, optimizer)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
    with contextlib.redirect_stdout(None) if stage == 3 else contextlib.nullcontext():
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    if timeout_s is not None:
        distributed.set_timeout(timeout_s)
    muon = None
    if optimizer.muon.generated:
        muon = _give_muon(engine, optimizer.muon, config["gradient_accumulation_steps"])
    if stage == 0 and torch.distributed.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # there is nobody to add to, and it copies every gradient twice
    let_the_lowest_scale_overflow(engine)
    if isinstance(adamw, GroupedAdamW) and stage in (1, 2):
        adamw.divide(engine.optimizer.round_robin_bit16_offsets)
    average = WeightAverage(optimizer.ema, lambda: fragments.masters(engine)) if optimizer.ema.decay else None
    return Engine(engine, optimizer.clip, muon, average)


def _give_muon(engine: Any, recipe: MuonRecipe, micro_batches: int) -> GeneratedMuon:
    """Let Muon change the gradients of the matrices that the model generates."""
    sharing = engine.module.sharebert.sharing
    shapes = {name: (block.rows, block.columns) for name, block in sharing.blocks.items() if name != "pooler"}
    muon = GeneratedMuon(recipe, shapes, micro_batches, engine.device)
    sharing.change_gradients = muon
    return muon
