"""Which parameters share a learning rate, a decay and a clip, and how rates follow the width of the model.

Each parameter is in one group. A group is decayed as a whole or not at all, so that DeepSpeed, which flattens groups,
keeps each of them as one.

The rule of widths carries rates that were tuned at width H0 to width H, by a factor on the rate of each group. AdamW
moves each element by about its rate. The product x·ΔW with n inputs then grows with up to n, so matrices get H0/H,
and vectors and tables that are looked up keep their rate (Yang et al., "Tensor Programs V", 2022, table 8). Some need
a word more:

- W_all counts as a matrix of the layers: an element of a generated matrix moves with those of W_all. factor_linear has
  F inputs, and F is taken to grow with H.
- E counts as a table. The layers' matrices are made from it too, but with `model.init_scale` W_all starts smaller in a
  wider model, so that they move less with E. With `sharing: eps` E is itself the matrices and counts as such.
- Muon's step has a largest singular value of 1 times its scale. For `original` this is what the width asks for (Yang,
  Simon and Bernstein, "A spectral condition for feature learning", 2023), so the factor is 1; `match_rms_adamw` makes
  it grow with the root of the width, so the factor is sqrt(H0/H).
"""

from __future__ import annotations

import math
from dataclasses import field, fields
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn

from pretrain.engine.muon import MuonRecipe, step_size
from sharebert import ShareBertConfig, parameter_roles
from sharebert_common.recipe import STRICT

SHARING = "sharebert.sharing."
"""How the names of matrices begin that a layer has as parameters. They are stored as [in, out]."""

LINEAR = ("sharebert.factor_linear.weight", "sharebert.factor_expansion.weight")
"""Matrices of the input, stored as [out, in]."""

STEPPED = ("factor_linear", "matrices")
"""Groups that Muon steps."""


@dataclass(config=STRICT, kw_only=True)
class GroupRecipe:
    """What differs in one group of parameters."""

    lr_factor: Annotated[float, Field(ge=0)] = 1.0
    """Learning rate of the group as a multiple of optimizer.lr (of optimizer.muon.lr where Muon steps it)."""
    clip: Annotated[float, Field(ge=0)] = 0.0
    """Highest norm of the gradient of the group, after that of the whole gradient was clipped; 0 does not clip. Not
    with zero.stage 3."""


@dataclass(config=STRICT, kw_only=True)
class GroupsRecipe:
    """Learning rates and clips by group. Each parameter is in one of these groups."""

    word_embeddings: GroupRecipe = field(default_factory=GroupRecipe)
    """E."""
    position_embeddings: GroupRecipe = field(default_factory=GroupRecipe)
    """Embeddings of positions and token types, and the weights of the two factor norms."""
    factor_linear: GroupRecipe = field(default_factory=GroupRecipe)
    """Matrices of the input: factor_linear, from rows of E to the width. With optimizer.muon.matrices Muon steps
    them."""
    generator: GroupRecipe = field(default_factory=GroupRecipe)
    """W_all, from which and from E the layers' matrices are generated."""
    matrices: GroupRecipe = field(default_factory=GroupRecipe)
    """The layers' matrices where they are parameters: with `sharing: layers`, `none` or `low_rank`. With
    optimizer.muon.matrices Muon steps them."""
    head: GroupRecipe = field(default_factory=GroupRecipe)
    """Matrices of the MLM head, and the projection of distillation."""
    vectors: GroupRecipe = field(default_factory=GroupRecipe)
    """All that is not decayed: biases, and the LayerNorms of layers and head."""

    @property
    def plain(self) -> bool:
        """Whether no group differs."""
        return self == GroupsRecipe()

    @property
    def clipped(self) -> bool:
        """Whether a group clips its gradient."""
        return any(getattr(self, each.name).clip for each in fields(self))


def group_of(name: str, *, decayed: bool) -> str:
    """The group of a parameter of a `ShareBertForMaskedLM`, a field of `GroupsRecipe`."""
    if not decayed:
        return "vectors"
    if name == "sharebert.word_embeddings.weight":
        return "word_embeddings"
    if name == "sharebert.factor_linear_all.weight":
        return "generator"
    if name in LINEAR:
        return "factor_linear"
    if name.startswith(SHARING):
        return "matrices"
    return "position_embeddings" if name.startswith("sharebert.") else "head"


def width_factor(group: str, config: ShareBertConfig, tuned_width: int | None, muon: MuonRecipe) -> float:
    """The factor on the learning rate of `group` in a model of `config`; 1 where no width is given."""
    if tuned_width is None or group in ("position_embeddings", "vectors"):
        return 1.0
    if group == "word_embeddings" and config.sharing != "eps":
        return 1.0
    ratio = tuned_width / config.hidden_size
    if group in STEPPED and muon.matrices:
        return 1.0 if muon.scale == "original" else math.sqrt(ratio)
    return ratio


def split_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    groups: GroupsRecipe,
    tuned_width: int | None,
    muon: MuonRecipe,
) -> list[dict[str, Any]]:
    """The groups of a `ShareBertForMaskedLM` that are not empty, for `GroupedAdamW`. Keys beside torch's:

    - `lr_factor`: the group's learning rate as a multiple of `lr`.
    - `clip`: highest norm of its gradient; 0 does not clip.
    - `matrices`: None, or for Muon the (rows, columns, step size) of each parameter.
    """
    roles, config = parameter_roles(model), model.config
    assert isinstance(config, ShareBertConfig)
    members: dict[str, list[tuple[str, nn.Parameter]]] = {each.name: [] for each in fields(GroupsRecipe)}
    for name, parameter in model.named_parameters():
        members[group_of(name, decayed=roles[name].decayed)].append((name, parameter))
    found = []
    for group, named in members.items():
        if not named:
            continue
        own: GroupRecipe = getattr(groups, group)
        stepped = group in STEPPED and muon.matrices
        decay = muon.weight_decay if stepped else weight_decay
        found.append(
            {
                "params": [parameter for _, parameter in named],
                "weight_decay": 0.0 if group == "vectors" else decay,
                "lr_factor": own.lr_factor
                * width_factor(group, config, tuned_width, muon)
                * (muon.lr / lr if stepped else 1.0),
                "clip": own.clip,
                "matrices": [_matrix(name, parameter, muon) for name, parameter in named] if stepped else None,
            }
        )
    return found


def _matrix(name: str, parameter: nn.Parameter, muon: MuonRecipe) -> tuple[int, int, float]:
    rows, columns = parameter.shape
    inputs, outputs = (columns, rows) if name in LINEAR else (rows, columns)
    return rows, columns, step_size(muon.scale, inputs, outputs)
