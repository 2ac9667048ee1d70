"""Groups of parameters: who is in which, how rates follow the width, and Muon's step of a whole matrix."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from tiny_runs import train_arguments

from pretrain.engine.muon import MuonRecipe
from pretrain.engine.optimizer import OptimizerRecipe, make_optimizer
from pretrain.engine.parameter_groups import GroupRecipe, GroupsRecipe, split_groups
from pretrain.recipe import TrainRecipe
from sharebert import ShareBertForMaskedLM, initialize, parameter_roles
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

MUON = MuonRecipe(matrices=True, momentum=0.9, weight_decay=0.1)


def named_groups(model: ShareBertForMaskedLM, recipe: OptimizerRecipe) -> dict[str, dict[str, Any]]:
    """The optimizer's group of each parameter, by the parameter's name."""
    groups = make_optimizer(model, recipe).param_groups
    of = {id(p): group for group in groups for p in group["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("sharing", ["veps", "eps", "layers", "none"])
@pytest.mark.parametrize("head", ["tied", "untied"])
def test_each_parameter_is_in_one_group_and_keeps_its_decay(sharing: str, head: str) -> None:
    model = ShareBertForMaskedLM(tiny_config(sharing=sharing, mlm_head=head))
    groups = make_optimizer(model, OptimizerRecipe(muon=MUON, tuned_width=24)).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    decays = {name: group["weight_decay"] for name, group in named_groups(model, OptimizerRecipe(muon=MUON)).items()}
    by_muon = {name for name, group in named_groups(model, OptimizerRecipe(muon=MUON)).items() if group["matrices"]}
    for name, role in parameter_roles(model).items():
        assert decays[name] == (0.1 if name in by_muon else 0.01 if role.decayed else 0.0), name
    own = {name for name, p in model.named_parameters() if name.startswith("sharebert.sharing.") and p.dim() == 2}
    assert bool(own) is (sharing in ("layers", "none"))
    assert by_muon == own | ({"sharebert.factor_linear.weight"} if sharing != "eps" else set())


def test_rates_of_groups_multiply() -> None:
    groups = GroupsRecipe(matrices=GroupRecipe(lr_factor=0.5), word_embeddings=GroupRecipe(lr_factor=3.0, clip=0.2))
    recipe = OptimizerRecipe(lr=1e-3, muon=MUON, groups=groups)
    found = named_groups(ShareBertForMaskedLM(tiny_config(sharing="none")), recipe)
    assert found["sharebert.word_embeddings.weight"]["lr_factor"] == 3.0
    assert found["sharebert.word_embeddings.weight"]["clip"] == 0.2
    assert found[f"sharebert.{QUERY}"]["lr_factor"] == pytest.approx(0.5 * 0.02 / 1e-3)
    assert found["sharebert.final_norm.weight"]["lr_factor"] == 1.0


QUERY = "sharing.layers.0.query"


@pytest.mark.parametrize(
    ("sharing", "muon", "factors"),
    [
        ("veps", {}, {"word_embeddings": 1.0, "factor_linear_all": 0.25, "factor_linear": 0.25}),
        ("none", {}, {"word_embeddings": 1.0, QUERY: 0.25, "factor_linear": 0.25}),
        ("none", {"matrices": True, "lr": 1e-3}, {QUERY: 1.0, "factor_linear": 1.0}),
        ("none", {"matrices": True, "lr": 1e-3, "scale": "match_rms_adamw"}, {QUERY: 0.5}),
    ],
)
def test_rates_follow_the_width(sharing: str, muon: dict[str, Any], factors: dict[str, float]) -> None:
    """Tuned at a quarter of the width."""
    model = ShareBertForMaskedLM(tiny_config(sharing=sharing, mlm_head="untied"))
    found = named_groups(model, OptimizerRecipe(lr=1e-3, muon=MuonRecipe(**muon), tuned_width=6))
    names = {f"sharebert.{name}{'' if name == QUERY else '.weight'}": factor for name, factor in factors.items()}
    names |= {"mlm_head.decoder.weight": 0.25, "mlm_head.dense.bias": 1.0, "sharebert.final_norm.weight": 1.0}
    names |= {"sharebert.position_embeddings.weight": 1.0}
    assert {name: found[name]["lr_factor"] for name in names} == pytest.approx(names)


def change(sharing: str, hidden: int, tuned_width: int | None) -> float:
    """Root mean square by which three steps of AdamW change the layers' products of one normal input."""
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "factor_size": hidden // 4}
    model = ShareBertForMaskedLM(tiny_config(sharing=sharing, vocab_size=1200, num_attention_heads=4, **sizes))
    initialize(model, "variance", 0, 0.35)
    optimizer = make_optimizer(model, OptimizerRecipe(tuned_width=tuned_width))
    generator = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(64, hidden, generator=generator), torch.randn(64, hidden, generator=generator)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * group.get("lr_factor", 1.0)
    products = []
    for _ in range(4):
        products.append(x @ model.sharebert.sharing(model.sharebert.train(), False).of_layer(0).query)
        optimizer.zero_grad()
        (products[-1] - wanted).square().mean().backward()
        optimizer.step()
    return float((products[3] - products[0]).detach().square().mean().sqrt())


def test_with_the_rule_steps_change_products_no_faster_in_wider_models() -> None:
    """Four times as wide: without the rule, products with matrices that are parameters change faster."""
    small = change("layers", 32, None)
    assert change("layers", 32, 32) == pytest.approx(small)
    assert 0.4 * small < change("layers", 128, 32) < 1.2 * small
    assert change("layers", 128, None) > 1.7 * small
    assert change("veps", 128, 32) < 1.5 * change("veps", 32, None)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_steps_as_torchs_own(scale: Any) -> None:
    """Torch's takes matrices as [out, in], which those of layers are not, and iterates in bf16."""
    model = tiny_model(sharing="none")
    recipe = OptimizerRecipe(lr=1e-3, muon=MuonRecipe(matrices=True, lr=0.05, weight_decay=0.1, scale=scale))
    ours = make_optimizer(model, recipe)
    for group in ours.param_groups:
        group["lr"] = 1e-3 * group["lr_factor"]
    named = {name: p for name, p in model.named_parameters() if "sharing.layers.0" in name}
    named["factor_linear"] = model.sharebert.factor_linear.weight
    copies = {
        name: torch.nn.Parameter((p if name == "factor_linear" else p.t()).detach().clone().contiguous())
        for name, p in named.items()
    }
    starts = {name: copy.detach().clone() for name, copy in copies.items()}
    theirs = torch.optim.Muon(list(copies.values()), lr=0.05, weight_decay=0.1, adjust_lr_fn=scale)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, p in named.items():
            p.grad = torch.randn(p.shape, generator=generator)
            copies[name].grad = (p.grad if name == "factor_linear" else p.grad.t()).contiguous()
        ours.step()
        theirs.step()
    for name, p in named.items():
        found = (p if name == "factor_linear" else p.t()).detach() - starts[name]
        wanted = copies[name].detach() - starts[name]
        assert (found - wanted).norm() < 0.02 * wanted.norm(), name


def test_a_group_clips_its_own_gradient() -> None:
    model = tiny_model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    recipe = OptimizerRecipe(groups=GroupsRecipe(vectors=GroupRecipe(clip=0.25), head=GroupRecipe(clip=1e6)))
    make_optimizer(model, recipe).step()
    roles = parameter_roles(model)
    vectors = [p.grad for name, p in model.named_parameters() if not roles[name].decayed and p.grad is not None]
    assert math.sqrt(sum(float(grad.square().sum()) for grad in vectors)) == pytest.approx(0.25, rel=1e-5)
    assert all((p.grad == 0.5).all() for name, p in model.named_parameters() if roles[name].decayed)  # type: ignore[union-attr]


def test_groups_that_are_empty_are_left_out() -> None:
    groups = split_groups(
        ShareBertForMaskedLM(tiny_config(sharing="layers", mlm_head="tied")),
        lr=1e-3,
        weight_decay=0.01,
        groups=GroupsRecipe(),
        tuned_width=None,
        muon=MuonRecipe(),
    )
    assert all(group["params"] for group in groups)
    assert len(groups) == 6  # no W_all


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optimizer__muon__matrices": True, "zero__stage": 3}, r"optimizer\.muon\.matrices: not with zero\.stage 3"),
        ({"optimizer__muon__matrices": True, "model__sharing": "eps"}, "eps has no matrices that are parameters"),
        ({"optimizer__groups__head__clip": 1.0, "zero__stage": 3}, r"optimizer\.groups: groups cannot clip"),
        ({"validate__ema": True}, r"validate\.ema: the run keeps no average"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load(TrainRecipe, None, train_arguments(tmp_path, tmp_path, **keys)).resolve(needs_data=False)
