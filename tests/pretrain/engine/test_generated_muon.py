"""Muon on generated matrices: orthogonal gradients that reach the factors, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from tiny_runs import train_arguments

from pretrain.engine.generated_muon import GeneratedMuon
from pretrain.engine.muon import MuonRecipe, orthogonalise
from pretrain.recipe import TrainRecipe
from sharebert import ShareBertForMaskedLM, initialize
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

MUON = {"optimizer__muon__generated": True, "optimizer__muon__momentum": 0.9}


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


@pytest.mark.parametrize("keys", [{"zero__stage": 3}, {"precision": "fp16"}])
def test_what_it_cannot_do_is_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    arguments = train_arguments(tmp_path, tmp_path, **MUON, **keys)
    with pytest.raises(BadInput) as refused:
        load(TrainRecipe, None, arguments).resolve(needs_data=False)
    assert str(refused.value) == (
        "optimizer.muon.generated: not with zero.stage 3 or precision fp16; use stage 0 to 2 and bf16"
    )


@pytest.mark.parametrize("sharing", ["layers", "none"])
def test_what_own_matrices_cannot_do_is_refused(tmp_path: Path, sharing: str) -> None:
    for keys, said in ((MUON, "generates no matrices"), ({"zero__stage": 3}, rf"zero\.stage: .* not for {sharing}")):
        arguments = train_arguments(tmp_path / "no data", tmp_path, model__sharing=sharing, **keys)
        with pytest.raises(BadInput, match=said):
            load(TrainRecipe, None, arguments).resolve(needs_data=False)
