"""Muon on generated matrices: orthogonal gradients, the same on any ranks, ZeRO stages and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from tiny_runs import log_of, losses, train_arguments, train_many

from pretrain.engine.generated_muon import GeneratedMuon
from pretrain.engine.muon import MuonRecipe, orthogonalise
from pretrain.recipe import TrainRecipe
from sharebert import ShareBertForMaskedLM, initialize
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

MUON = {"optimizer__muon__generated": True, "optimizer__muon__momentum": 0.9}
MASKS = {"data__mask_rate": 0.4, "data__mask_schedule__last_rate": 0.15, "data__mask_schedule__masked": 1.0}
NEW = MUON | MASKS | {"data__mask_schedule__random": 0.0, "model__init_scale": 0.35, "schedule__decay": "wsd"}
NEW |= {"data__micro_batch": 4}
NEW |= {"data__row_length__first": 8, "model__branch_gain": 0.5, "model__learned_branch_gains": True}
NEW |= {"model__ffn_pairs": 2, "model__hidden_size": 24, "model__intermediate_size": 24}
MATRICES = {"model__sharing": "none", "optimizer__muon__matrices": True, "optimizer__groups__head__clip": 0.1}
MATRICES |= {"optimizer__groups__word_embeddings__lr_factor": 2.0, "optimizer__tuned_width": 16}
MATRICES |= {"optimizer__ema__decay": 0.9, "validate__ema": True, "validate__every": 5, "data__micro_batch": 4}
"""Muon on parameters, groups, the rule of widths and an average."""


@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24)])
def test_singular_values_come_near_1_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    s = torch.diagonal(u.t() @ orthogonalise(matrix, 5) @ v.t())
    assert s.min() > 0.5
    assert s.max() < 1.3


def test_gradients_of_micro_batches_become_one_orthogonal_gradient_on_the_factors() -> None:
    """Two steps of two micro-batches against a transcription: momentum 0.9, Nesterov, the norm of the gradient."""
    torch.manual_seed(1)
    model = ShareBertForMaskedLM(tiny_config()).sharebert
    initialize(model, "variance", 0)
    sharing = model.sharing
    shapes = {name: (b.rows, b.columns) for name, b in sharing.blocks.items() if name != "pooler"}  # type: ignore[attr-defined]
    muon = GeneratedMuon(MuonRecipe(generated=True, momentum=0.9), shapes, 2, torch.device("cpu"))
    momentum = {name: torch.zeros(shape) for name, shape in shapes.items()}
    e, w = model.word_embeddings.weight, model.factor_linear_all.weight
    for _ in range(2):
        given = [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]
        model.zero_grad(set_to_none=True)
        sharing.change_gradients = muon  # type: ignore[attr-defined]
        for gradients in given:
            made = model.layer_weights(False).of_layer(0)._asdict()
            torch.autograd.backward([made[name] for name in shapes], list(gradients.values()))
        found = e.grad.clone(), w.grad.clone()  # type: ignore[union-attr]
        muon.end_step(skipped=False)
        sharing.change_gradients = None  # type: ignore[attr-defined]
        model.zero_grad(set_to_none=True)
        wanted = []
        for name in shapes:
            total = given[0][name] + given[1][name]
            momentum[name] = 0.9 * momentum[name] + total
            direction = orthogonalise(total + 0.9 * momentum[name], 5)
            wanted.append(direction * total.norm() / direction.norm())
        made = model.layer_weights(False).of_layer(0)._asdict()
        torch.autograd.backward([made[name] for name in shapes], wanted)
        torch.testing.assert_close(found, (e.grad, w.grad), rtol=1e-4, atol=1e-6)


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    arguments = train_arguments(tmp_path, tmp_path, **MUON, zero__stage=3)
    with pytest.raises(BadInput, match=r"optimizer\.muon\.generated: not with zero\.stage 3"):
        load(TrainRecipe, None, arguments).resolve(needs_data=False)


@pytest.mark.parametrize("sharing", ["layers", "none"])
def test_what_own_matrices_cannot_do_is_refused(tmp_path: Path, sharing: str) -> None:
    for keys, said in ((MUON, "generates no matrices"), ({"zero__stage": 3}, rf"zero\.stage: .* not for {sharing}")):
        arguments = train_arguments(tmp_path / "no data", tmp_path, model__sharing=sharing, **keys)
        with pytest.raises(BadInput, match=said):
            load(TrainRecipe, None, arguments).resolve(needs_data=False)


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes on 1, 2 and 3 ranks at stages 0, 1 and 2, and resumed on 2 ranks from step 14 of other runs."""
    top = tmp_path_factory.mktemp("muon")
    for ranks in (1, 2, 3):
        plan: list[dict[str, Any]] = []
        for recipe, keys in (("generated", NEW), ("matrices", MATRICES)):
            folder, given = top / recipe, {**keys, "checkpoint__every": 7}
            for stage in (0, 1, 2):
                run = folder / f"{ranks}-{stage}"
                plan.append({"overrides": train_arguments(dataset, run, **given, zero__stage=stage)})
            for name, source in (("resumed", "1-1"), ("again", "2-2")) if ranks == 2 else ():
                overrides = train_arguments(dataset, folder / name, **given, zero__stage=2)
                plan.append({"overrides": overrides, "copy": [str(folder / source), 14]})
        train_many(plan, ranks, top)
    return top


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["generated", "matrices"])
def test_losses_agree_on_any_ranks_and_stages_and_after_a_resume(runs: Path, recipe: str) -> None:
    """`generated`: the start, the masks' schedule, short rows first, Muon, the learning rate's schedule, learned branch
    gains and a second feed-forward pair, all at once."""
    folder = runs / recipe
    first, validated = losses(folder / "1-0"), validation_losses(folder / "1-0")
    assert len(first) == 20
    for run in sorted(folder.iterdir()):
        assert losses(run) == pytest.approx(first, rel=2e-4), run.name
        assert validation_losses(run) == pytest.approx(validated, rel=2e-4), run.name
    assert losses(folder / "again") == losses(folder / "2-2")
    assert validation_losses(folder / "again") == validation_losses(folder / "2-2")


def validation_losses(run: Path) -> list[float]:
    """The loss of each validation."""
    return [line["valid_loss"] for line in log_of(run) if "valid_loss" in line]
