"""The optimizer as the recipe asks for it: its settings, its groups of parameters, its learning rate at each step."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from pretrain.engine.ema import EmaRecipe
from pretrain.engine.grouped_adamw import GroupedAdamW
from pretrain.engine.muon import MuonRecipe
from pretrain.engine.parameter_groups import GroupsRecipe, split_groups
from sharebert import parameter_roles
from sharebert_common.recipe import STRICT

DecayRate = Annotated[float, Field(ge=0, lt=1)]


@dataclass(config=STRICT, kw_only=True)
class OptimizerRecipe:
    """AdamW, with the authors' settings."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Highest learning rate, reached at the end of the warm-up."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.98)
    """Decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay, on everything except biases and the LayerNorms of layers and head."""
    clip: Annotated[float, Field(ge=0)] = 0.5
    """Highest norm of the whole gradient; 0 does not clip."""
    muon: MuonRecipe = field(default_factory=MuonRecipe)
    """Orthogonal steps of matrices, and orthogonal gradients of the generated matrices."""
    groups: GroupsRecipe = field(default_factory=GroupsRecipe)
    """Learning rates and clips by group of parameters."""
    tuned_width: Annotated[int, Field(gt=0)] | None = None
    """The width (hidden_size) at which the learning rates were tuned. In a model of another width the rates of matrices
    are multiplied by tuned_width/hidden_size (after Yang et al., "Tensor Programs V", 2022; docs/recipe.md has the
    rule). Without it, rates are taken as they are."""
    ema: EmaRecipe = field(default_factory=EmaRecipe)
    """A moving average of the weights, which validation and exports can use."""

    @property
    def grouped(self) -> bool:
        """Whether groups differ in more than decay."""
        return self.muon.matrices or self.tuned_width is not None or not self.groups.plain


@dataclass(config=STRICT, kw_only=True)
class ScheduleRecipe:
    """Learning rate over the steps: linear warm-up from 0, then one of four shapes that end at `final`."""

    warmup: Annotated[float, Field(ge=0)] = 0.06
    """Length of the warm-up: a fraction of all steps below 1, a number of steps from 1."""
    decay: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Shape after the warm-up. `wsd` (warm-up, stable, decay: Hu et al., "MiniCPM", COLM 2024, section 4) stays at the
    highest rate up to the last `cooldown` steps, and falls linearly over these. So one long run serves several budgets:
    each is a resume with fewer `steps`, but no fewer than the checkpoint has."""
    cooldown: Annotated[float, Field(gt=0)] = 0.2
    """Length of the decay of `wsd`: a fraction of all steps up to 1, a number of steps above 1."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last learning rate as a fraction of the highest."""


def learning_rate(step: int, steps: int, highest: float, recipe: ScheduleRecipe) -> float:
    """The learning rate of optimizer step `step`, counted from 1, of `steps`. A pure function."""
    warmup = recipe.warmup if recipe.warmup >= 1 else recipe.warmup * steps
    if step < warmup:
        return highest * step / warmup
    if recipe.decay == "constant":
        return highest
    if recipe.decay == "wsd":
        cooldown = recipe.cooldown if recipe.cooldown > 1 else recipe.cooldown * steps
        warmup = max(warmup, steps - cooldown)  # the decay begins here
        if step < warmup:
            return highest
    done = min(1.0, (step - warmup) / max(1.0, steps - warmup))
    shape = 1 - done if recipe.decay != "cosine" else (1 + math.cos(math.pi * done)) / 2
    return highest * (recipe.final + (1 - recipe.final) * shape)


def make_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """The optimizer of `model`, at learning rate 0. Each group's rate is its `lr_factor` times the rate of a step."""
    settings: dict[str, Any] = {"lr": 0.0, "betas": recipe.betas, "eps": recipe.eps, "fused": True}
    if not recipe.grouped:
        return torch.optim.AdamW(optimizer_groups(model, recipe.weight_decay), **settings)
    groups = split_groups(
        model,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        groups=recipe.groups,
        tuned_width=recipe.tuned_width,
        muon=recipe.muon,
    )
    return GroupedAdamW(groups, recipe.muon, **settings)


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters in two groups, decayed and not. The model's modules say which; the order is that of
    `named_parameters`. Raises ShareBertError, naming it, for a parameter of which no module says it.
    """
    roles = parameter_roles(model)
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if roles[name].decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not roles[name].decayed], "weight_decay": 0.0},
    ]
