"""Steps after `trim`: a trimmed export stores the last rows of W_all alone, and what is computed for them is what is
computed for the same rows of the whole matrix."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress_models import tiny_export

from compress.low_rank.factor_step import LowerFactor
from compress.prune.movement import Movement
from compress.prune.prunable import PrunableCompact
from compress.prune.weights_step import PruneWeights
from compress.quantise.step import EMBEDDING, PROJECTION, Quantise
from compress.source import open_source
from compress.trim import Trim
from exports.export import Export
from exports.forms import write_export
from exports.read import load_model
from exports.weight_files import read_weights

PADDED = 3


def tools(scratch: Path) -> Any:
    tokens = torch.randint(5, 250, (48, 12), generator=torch.Generator().manual_seed(2))
    tokens[::2, -PADDED:] = 0
    return SimpleNamespace(calibration=lambda: tokens, seed=0, scratch=scratch / "scratch", say=lambda _: None)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A trimmed export, and the same model with all rows of W_all, those that nobody reads at zero."""
    source, trimmed, whole = tiny_export(tmp_path / "source", mlm_head="tied"), tmp_path / "trimmed", tmp_path / "whole"
    trimmed.mkdir()
    Trim().apply(open_source(source), tools(tmp_path), trimmed)
    write_export(Export.of_model(load_model(trimmed), tokenizer=trimmed / "tokenizer.json"), whole)
    stored = [len(read_weights(folder)[PROJECTION]) for folder in (trimmed, whole)]
    assert 0 < stored[0] < stored[1], "no row is left out, so that nothing is tested"
    return trimmed, whole


def both(pair: tuple[Path, Path]) -> tuple[PrunableCompact, PrunableCompact]:
    trimmed, whole = (PrunableCompact(open_source(folder)) for folder in pair)
    return trimmed, whole


def the_same(trimmed: torch.Tensor, whole: torch.Tensor, rtol: float = 1e-3) -> None:
    """Rows of a trimmed matrix are the last ones of the whole."""
    expected = whole[len(whole) - len(trimmed) :]
    assert expected.any()
    torch.testing.assert_close(trimmed, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_costs_are_those_of_the_whole_matrix(pair: tuple[Path, Path], tmp_path: Path) -> None:
    trimmed, whole = (model.costs(model.weights, tools(tmp_path)) for model in both(pair))
    for name in (EMBEDDING, PROJECTION):
        the_same(trimmed[name], whole[name])


def test_padding_costs_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Neither in Wanda's costs nor in the basis of `lower_factor`."""
    rows = tools(tmp_path).calibration()[::2]
    costs, matrices = [], []
    for number, tokens in enumerate((rows[:, :-PADDED], rows)):
        given: Any = SimpleNamespace(calibration=lambda tokens=tokens: tokens)
        model, out = both(pair)[1], tmp_path / f"lower-{number}"
        costs.append(model.costs(model.weights, given)[EMBEDDING])
        LowerFactor(size=4).apply(open_source(pair[1]), given, out)
        lower = load_model(out).sharebert
        matrices.append(lower.factor_expansion(lower.word_embeddings.weight).detach())
    torch.testing.assert_close(*costs, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(*matrices, rtol=1e-3, atol=1e-4)


def test_the_surgeons_gradients_are_those_of_the_same_rows(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found, weights = [], [model.weights for model in both(pair)]
    larger = weights[1][PROJECTION].numel() / weights[0][PROJECTION].numel()
    for model, own, damping in zip(both(pair), weights, (0.1, 0.1 * larger), strict=True):  # a part of the mean
        step = PruneWeights(method="surgeon", block=4, damping=damping)
        centres = {name: torch.zeros(tensor.shape[1]) for name, tensor in own.items()}
        rows = model.batches(tools(tmp_path), 6)
        inverse = step.inverse_fisher(model, own, centres, rows, 0)[PROJECTION].inverse
        found.append(inverse.view(len(own[PROJECTION]), -1))
    the_same(*found)


def test_movement_trains_the_same_rows(pair: tuple[Path, Path], tmp_path: Path) -> None:
    gradients = []
    for model in both(pair):
        weights = model.weights
        module = model.with_weights(weights)
        centres = {name: torch.zeros(tensor.shape[1]) for name, tensor in weights.items()}
        movement = Movement(module, weights, centres, 0.5, "matrix")
        before = module.get_parameter(PROJECTION).detach().clone()
        movement.put(movement.removed(0.0))
        assert module.get_parameter(PROJECTION).equal(before)
        model.training_loss(module, model.batches(tools(tmp_path), 48)[0]).backward()
        movement.take_gradients()
        gradient = movement.weights[PROJECTION].grad
        assert gradient is not None
        gradients.append(gradient)
    the_same(*gradients)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "surgeon", "movement"])
@pytest.mark.parametrize("centre", [False, True])
def test_a_trimmed_export_is_pruned(pair: tuple[Path, Path], tmp_path: Path, method: str, centre: bool) -> None:
    """As the shipped recipe `prune-weights` does it: what is left of W_all are its stored rows."""
    keys: dict[str, Any] = {"method": method, "centre": centre, "scope": "matrix", "gradients": 8, "block": 4}
    step = PruneWeights(**keys, recomputations=2, steps=6)
    notes = step.apply(open_source(pair[0]), tools(tmp_path), tmp_path / "out")
    stored = len(read_weights(pair[0])[PROJECTION])
    before, after = (load_model(folder).get_parameter(PROJECTION) for folder in (pair[0], tmp_path / "out"))
    assert not after[: len(after) - stored].any()
    gone = after[len(after) - stored :] == 0
    assert float(gone.float().mean()) == pytest.approx(notes[f"removed of {PROJECTION}"], abs=1e-3) == 0.5
    if method in ("magnitude", "wanda"):
        assert after[-stored:][~gone].equal(before[-stored:][~gone])


@pytest.mark.parametrize(
    "keys",
    [{"rounding": "gptq"}, {"rounding": "gptq", "rotate": True, "small_bits": 6}, {"awq": True, "group": 4}],
    ids=str,
)
def test_a_trimmed_export_is_quantised_as_the_whole_one(
    pair: tuple[Path, Path], tmp_path: Path, keys: dict[str, Any]
) -> None:
    """As the shipped recipe `awq` does it."""
    found = []
    for folder in pair:
        out = tmp_path / f"{folder.name}-out"
        out.mkdir()
        Quantise(bits=4, **keys).apply(open_source(folder), tools(tmp_path), out)
        found.append(load_model(out))
    stored = len(read_weights(pair[0])[PROJECTION])
    for name, rows in ((EMBEDDING, 250), (PROJECTION, stored)):
        ours, theirs = (model.get_parameter(name)[-rows:] for model in found)
        assert ours.any()
        near = (ours - theirs).abs() < 1e-3 * theirs.abs().max()
        assert near.float().mean() > 0.99, name  # a number at the edge of two codes may take the other one
