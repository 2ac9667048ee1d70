"""Optimal BERT Surgeon: its parts, and the step `prune_weights` with it, against F that is made without them."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress_models import tiny_export

from compress.calibrate import Batch, batches
from compress.prune import surgeon, weights_step
from compress.prune.prunable import PrunableCompact
from compress.prune.surgeon import InverseFisher, blocked, saliency, unblocked, without
from compress.prune.weights_step import PruneWeights
from compress.source import open_source
from exports.read import load_model
from sharebert import ShareBertForMaskedLM
from sharebert.packed import ROTATED


def tools(scratch: Path) -> Any:
    tokens = torch.randint(5, 250, (48, 12), generator=torch.Generator().manual_seed(2))
    return SimpleNamespace(calibration=lambda: tokens, seed=0, scratch=scratch / "scratch", say=lambda line: None)


def problem(gradients: int = 40, blocks: int = 3, size: int = 5) -> tuple[torch.Tensor, InverseFisher, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(gradients, blocks, size, generator=generator)
    inverse = InverseFisher(blocks, size, gradients, 0.3)
    for first in range(0, gradients, 16):
        inverse.add(g[first : first + 16])
    explicit = torch.einsum("nbi,nbj->bij", g, g) / gradients + 0.3 * torch.eye(size)
    return torch.randn(blocks, size, generator=generator), inverse, explicit


@pytest.mark.parametrize("at_once", [2, 3])
def test_woodbury_gives_the_explicit_inverse(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(surgeon, "BLOCKS_AT_ONCE", at_once)
    _, inverse, explicit = problem()
    torch.testing.assert_close(inverse.inverse, torch.linalg.inv(explicit), rtol=1e-4, atol=1e-5)


def test_saliency_and_update_of_one_weight_are_those_of_the_paper() -> None:
    weights, inverse, explicit = problem()
    explicit_inverse = torch.linalg.inv(explicit)
    found = saliency(weights, inverse)
    for block in range(3):
        for q in range(5):
            w, f = weights[block], explicit_inverse[block]
            assert found[block, q].item() == pytest.approx((w[q] ** 2 / (2 * f[q, q])).item(), rel=1e-3)
            removed = torch.zeros(3, 5, dtype=torch.bool)
            removed[block, q] = True
            by_hand = w - w[q] / f[q, q] * f[:, q]
            by_hand[q] = 0
            torch.testing.assert_close(without(weights, removed, inverse)[block], by_hand, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("at_once", [2, 3])
def test_the_update_of_several_weights_costs_least(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """The oracle: minimise ½·δᵀFδ over the weights that stay, by their own normal equations."""
    monkeypatch.setattr(surgeon, "BLOCKS_AT_ONCE", at_once)
    weights, inverse, explicit = problem()
    removed = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    found = without(weights, removed, inverse)
    for block in range(3):
        stay, go = ~removed[block], removed[block]
        f, w = explicit[block], weights[block]
        expected = torch.zeros(5)
        expected[stay] = w[stay] + torch.linalg.solve(f[stay][:, stay], f[stay][:, go] @ w[go])
        torch.testing.assert_close(found[block], expected, rtol=1e-3, atol=1e-4)


def test_blocks_are_neighbours_of_a_row() -> None:
    matrix = torch.arange(14.0).view(2, 7)
    blocks = blocked(matrix, 3)
    assert blocks[1].tolist() == [3, 4, 5]
    assert blocks[2].tolist() == [6, 0, 0]
    assert unblocked(blocks, matrix.shape).equal(matrix)


def explicit_fisher(
    model: ShareBertForMaskedLM, rows: list[Batch], block: int, damping: float
) -> dict[str, list[list[torch.Tensor]]]:
    """F of each matrix, by row and by block of neighbours, in float64; the weights that are zero have no gradient.
    λ is `damping` times the mean squared gradient of the first CHUNK batches."""
    parameters = {name: model.get_parameter(name) for name in ROTATED}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in parameters}
    for batch in rows:
        logits = model.logits(batch.tokens, batch.visible)
        loss = torch.zeros(())
        for scores, labels in zip(logits, batch.labels, strict=True):
            loss = loss + torch.nn.functional.cross_entropy(scores, labels) / len(batch.tokens)
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            gradients[name].append(torch.where(parameters[name] == 0, 0.0, gradient).detach().double())
    found: dict[str, list[list[torch.Tensor]]] = {}
    for name, given in gradients.items():
        g = torch.stack(given)  # [m, rows, columns]
        start = damping * g[: weights_step.CHUNK].square().mean()
        found[name] = []
        for row in range(g.shape[1]):
            parts = g[:, row].split(block, 1)
            found[name].append([part.t() @ part / len(part) + start * torch.eye(part.shape[1]) for part in parts])
    return found


def test_the_inverse_is_that_of_the_gradients_of_single_batches(tmp_path: Path) -> None:
    """More batches than are added at once, and blocks that do not fill a row."""
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    rows = batches(tools(tmp_path).calibration(), source / "tokenizer.json", 0, 2)
    assert len(rows) > weights_step.CHUNK
    model = load_model(source)
    with torch.no_grad():
        for name in ROTATED:
            model.get_parameter(name)[::3, 2:5] = 0
    weights = {name: model.get_parameter(name).detach() for name in ROTATED}
    step = PruneWeights(method="surgeon", block=3, damping=0.3)
    centres = {name: torch.zeros(tensor.shape[1]) for name, tensor in weights.items()}
    found = step.inverse_fisher(PrunableCompact(open_source(source)), weights, centres, rows, 0)
    for name, by_rows in explicit_fisher(model, rows, 3, 0.3).items():
        inverses = iter(found[name].inverse)
        for blocks in by_rows:
            for block in blocks:
                inverse = next(inverses)[: len(block), : len(block)].double()
                torch.testing.assert_close(inverse @ block, torch.eye(len(block)).double(), rtol=0, atol=1e-3)
        assert next(inverses, None) is None


def test_each_recomputation_removes_what_costs_least_and_the_others_make_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against F itself: each step from the weights that the one before left, and the share grows as scheduled."""
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    rows = batches(tools(tmp_path).calibration(), source / "tokenizer.json", 0, 3)
    model = load_model(source)
    saved = [{name: model.get_parameter(name).detach().clone() for name in ROTATED}]
    monkeypatch.setattr(
        weights_step,
        "save_state",
        lambda _, state: saved.append({name: tensor.clone() for name, tensor in state["weights"].items()}),
    )
    step, out = PruneWeights(method="surgeon", sparsity=0.8, recomputations=3, gradients=16, block=4), tmp_path / "out"
    step.apply(open_source(source), tools(tmp_path), out)
    shares = [torch.cat([tensor.flatten() == 0 for tensor in weights.values()]).float().mean() for weights in saved]
    assert [float(share) for share in shares] == pytest.approx([0, 0.8 * 19 / 27, 0.8 * 26 / 27, 0.8], abs=1e-3)
    for before, after in itertools.pairwise(saved):
        with torch.no_grad():
            for name, tensor in before.items():
                model.get_parameter(name).copy_(tensor)
        costs: dict[bool, list[float]] = {True: [], False: []}
        for name, by_rows in explicit_fisher(model, rows, 4, 0.1).items():
            for row, blocks in enumerate(by_rows):
                parts = zip(blocks, before[name][row].double().split(4), after[name][row].split(4), strict=True)
                for f, w, left in parts:
                    gone, inverse = left == 0, torch.linalg.inv(f)
                    for cost, went, was in zip(w**2 / (2 * inverse.diagonal()), gone, w, strict=True):
                        if was != 0:
                            costs[bool(went)].append(float(cost))
                    made_up = w[~gone] + torch.linalg.solve(f[~gone][:, ~gone], f[~gone][:, gone] @ w[gone])
                    torch.testing.assert_close(left[~gone].double(), made_up, rtol=1e-2, atol=1e-3)
        assert max(costs[True]) <= min(costs[False]) * 1.01
    for name, tensor in saved[-1].items():
        assert load_model(out).get_parameter(name).equal(tensor)
