"""The step `prune_weights`, and that its zeros survive loading and training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compress_models import killed, tiny_export, tokens_of
from safetensors.numpy import load_file
from tiny_models import tiny_model, tiny_tokenizer

from compress import training
from compress.calibrate import batches, hidden_states, objective
from compress.prune import weights_step
from compress.prune.masks import smallest, sparsity_after
from compress.prune.movement import Movement
from compress.prune.weights_step import PruneWeights
from compress.source import open_source
from compress.trim import Trim
from exports.compact import Compact
from exports.export import Export
from exports.forms import write_export
from exports.read import load_model, read_export
from pretrain.engine.zeros import keep_zeros
from pretrain.model import ModelRecipe, build_model, choose_model
from sharebert_common.errors import BadInput

E, ALL = "sharebert.word_embeddings.weight", "sharebert.factor_linear_all.weight"


def tools(scratch: Path, rows: int = 48) -> Any:
    tokens = torch.randint(5, 250, (rows, 12), generator=torch.Generator().manual_seed(2))
    said: list[str] = []
    return SimpleNamespace(calibration=lambda: tokens, seed=0, scratch=scratch / "scratch", say=said.append, said=said)


def pruned(folder: Path, source: Path, name: str = "out", **keys: Any) -> tuple[Path, dict[str, Any]]:
    step, out = PruneWeights(**keys), folder / name
    step.check(open_source(source))
    return out, step.apply(open_source(source), tools(folder), out)


def test_scopes() -> None:
    scores = {"a": torch.tensor([[1.0, 2, 3, 4, 9]]), "b": torch.tensor([[10.0, 0.5, 30, 20, 5]])}
    together, each, half = (smallest(scores, 0.4, scope) for scope in ("global", "matrix", "2:4"))  # type: ignore[arg-type]
    assert together["a"].tolist() == [[True, True, True, False, False]]
    assert together["b"].tolist() == [[False, True, False, False, False]]
    assert each["b"].tolist() == [[False, True, False, False, True]]
    assert half["b"].tolist() == [[True, True, False, False, False]]
    assert sparsity_after(4, 4, 0.1, 0.9) == 0.9
    assert sparsity_after(1, 2, 0.0, 0.8) == pytest.approx(0.7)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "surgeon", "movement"])
@pytest.mark.parametrize("scope", ["global", "matrix", "2:4"])
def test_the_file_holds_only_what_is_not_zero(tmp_path: Path, method: str, scope: str) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    out, _ = pruned(tmp_path, source, method=method, scope=scope, gradients=12, block=4, steps=6)
    model, file = load_model(out), load_file(out / "model.safetensors")
    zeros = total = 0
    for name in (E, ALL):
        bits = np.unpackbits(file[f"{name}.mask"], bitorder="little")
        shape = tuple(file[f"{name}.shape"])
        by_numpy = np.zeros(np.prod(shape), dtype=np.float32)
        by_numpy[bits[: by_numpy.size] == 1] = file[f"{name}.values"]
        assert (by_numpy.reshape(shape) == model.get_parameter(name).detach().numpy()).all()
        zeros, total = zeros + int((by_numpy == 0).sum()), total + by_numpy.size
        if scope == "2:4":
            assert ((by_numpy.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert zeros == pytest.approx(total / 2, abs=2)
    assert (out / "model.safetensors").stat().st_size < 0.85 * (source / "model.safetensors").stat().st_size


def test_magnitude_keeps_the_largest_as_they_are(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source")
    out, _ = pruned(tmp_path, source, method="magnitude", sparsity=0.9, scope="matrix")
    before, after = load_model(source).get_parameter(E), load_model(out).get_parameter(E)
    limit = before.abs().flatten().sort().values[round(0.9 * before.numel())]
    assert after.equal(torch.where(before.abs() >= limit, before, 0.0))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "surgeon"])
def test_with_centre_what_is_removed_is_the_mean_of_its_column(tmp_path: Path, method: str) -> None:
    source = tiny_export(tmp_path / "source")
    before = load_model(source).get_parameter(E).detach()
    out, notes = pruned(tmp_path, source, method=method, sparsity=0.5, centre=True, scope="matrix", gradients=16)
    files = load_file(out / "model.safetensors")
    np.testing.assert_allclose(files[f"{E}.fill"], before.mean(0), rtol=1e-5, atol=1e-7)
    assert f"{ALL}.fill" not in files
    after = load_model(out).get_parameter(E).detach()
    removed = after == torch.from_numpy(files[f"{E}.fill"])
    assert removed.float().mean() == pytest.approx(0.5, abs=1e-3)
    assert len(files[f"{E}.values"]) == (~removed).sum()
    if method == "magnitude":
        distances = (before - before.mean(0)).abs()
        assert distances[removed].max() <= distances[~removed].min() + 1e-7
    if method != "surgeon":
        torch.testing.assert_close(after[~removed], before[~removed], rtol=1e-5, atol=1e-7)
    assert notes[f"removed of {E}"] == 0.5
    again = tmp_path / "again"
    write_export(read_export(out), again)
    assert all((load_file(again / "model.safetensors")[name] == part).all() for name, part in files.items())


@pytest.mark.parametrize(("matrix", "other"), [(E, ALL), (ALL, E)])
def test_wanda_removes_large_numbers_whose_errors_cost_nothing(tmp_path: Path, matrix: str, other: str) -> None:
    """A column of one factor is multiplied by that of the other alone: where this is nearly zero, it may go."""
    model = tiny_model(mlm_head="none")
    with torch.no_grad():
        model.get_parameter(matrix)[:, 3] *= 10
        model.get_parameter(other)[:, 3] *= 1e-4
        model.sharebert.pre_factor_norm.weight[3] = 0  # nor does the looked-up word need it
    source = tmp_path / "source"
    write_export(Export.of_model(model, tokenizer=tiny_tokenizer(tmp_path)), source)
    out, _ = pruned(tmp_path, source, method="wanda", sparsity=0.5, scope="matrix")
    assert (load_model(out).get_parameter(matrix)[:, 3] == 0).all()


def test_a_killed_step_goes_on_after_the_last_recomputation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_export(tmp_path / "source")
    keys: dict[str, Any] = {"method": "surgeon", "gradients": 8, "recomputations": 3}
    whole, _ = pruned(tmp_path / "whole", source, **keys)
    for step, expected in ((2, [1, 2]), (3, [3])):
        with killed(weights_step, step) as saved:
            pruned(tmp_path / "killed", source, **keys)
        assert saved == expected
    out, _ = pruned(tmp_path / "killed", source, **keys)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_movement_scores_are_the_sums_of_gradient_times_weight(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    rows = batches(tools(tmp_path).calibration(), source / "tokenizer.json", 0)
    model, by_hand = load_model(source), load_model(source)
    weights = {name: model.get_parameter(name).detach().clone() for name in (E, ALL)}
    centres = {E: torch.full((8,), 0.25), ALL: torch.zeros(8)}
    less = {name: tensor - centres[name] for name, tensor in weights.items()}
    movement = Movement(model, less, centres, 0.5, "global")
    gone = {name: torch.rand(tensor.shape) < 0.3 for name, tensor in weights.items()}
    with torch.no_grad():
        for name, tensor in weights.items():
            by_hand.get_parameter(name).copy_(torch.where(gone[name], centres[name].expand_as(tensor), tensor))
    expected = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for batch in rows[:2]:
        movement.put(gone)
        objective(model, batch, hidden_states(model, batch), torch.Generator()).backward()
        movement.take_gradients()
        loss = objective(by_hand, batch, hidden_states(by_hand, batch), torch.Generator())
        gradients = torch.autograd.grad(loss, [by_hand.get_parameter(name) for name in expected])
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] -= gradient * less[name]
    for name, scores in expected.items():
        torch.testing.assert_close(movement.scores[name].detach(), scores, rtol=1e-4, atol=1e-5)
        assert (scores[gone[name]] != 0).any()  # gradients reach what is removed
    shares = [movement.share(step, 100) for step in range(1, 101)]
    assert shares[:10] == [0] * 10
    assert shares[44] == pytest.approx(0.5 - 0.5 * 0.5**3)
    assert shares[79:] == [0.5] * 21
    assert shares == sorted(shares)


def test_a_killed_movement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    monkeypatch.setattr(training, "SAVE_EVERY", 10)
    keys: dict[str, Any] = {"method": "movement", "steps": 25, "batch": 8, "lr": 1e-2, "centre": True}
    whole, _ = pruned(tmp_path / "whole", source, **keys)
    for step in (10, 20):
        with killed(training, step):
            pruned(tmp_path / "killed", source, **keys)
    out, _ = pruned(tmp_path / "killed", source, **keys)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_movement_learns(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    rows = batches(tools(tmp_path).calibration(), source / "tokenizer.json", 0)

    def loss(folder: Path) -> float:
        model = load_model(folder)
        with torch.no_grad():
            return sum(objective(model, b, hidden_states(model, b), torch.Generator()).item() for b in rows) / 48

    by_size, _ = pruned(tmp_path, source, method="magnitude", sparsity=0.8)
    out, _ = pruned(tmp_path, source, name="moved", method="movement", sparsity=0.8, steps=40, batch=8, lr=1e-2)
    assert loss(out) < loss(by_size) - 0.1


def test_transformers_loads_it_trimmed_or_not(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    source = tiny_export(tmp_path / "source", mlm_head="tied")
    first, _ = pruned(tmp_path, source, method="magnitude")
    Trim().apply(open_source(first), None, tmp_path / "trimmed")  # type: ignore[arg-type]
    assert f"{ALL}.mask" in load_file(tmp_path / "trimmed" / "model.safetensors")
    for folder in (first, tmp_path / "trimmed"):
        expected, tokens = load_model(folder), tokens_of(read_export(folder).config)
        model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
        torch.testing.assert_close(model(tokens).logits, expected.logits(tokens), rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / "copy")
        assert "sparse" not in json.loads((tmp_path / "copy" / "config.json").read_text())


def test_another_dtype_rounds_the_values_and_leaves_the_mask(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source")
    out, _ = pruned(tmp_path, source, method="magnitude")
    write_export(read_export(out), tmp_path / "half", Compact(torch.float16))
    expected, found = load_model(out).get_parameter(E), load_model(tmp_path / "half").get_parameter(E)
    assert found.equal(expected.half().float())


def removed(tensor: torch.Tensor) -> torch.Tensor:
    """Where a sparse tensor has the most frequent number of its column."""
    return tensor == tensor.mode(0).values


@pytest.mark.parametrize("centre", [False, True])
def test_zeros_survive_training(centre: bool, tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source", mlm_head="tied")
    out, _ = pruned(tmp_path, source, method="magnitude", sparsity=0.8, centre=centre)
    choice = choose_model(ModelRecipe(init_from=str(out), keep_zeros=True), None, None)
    model = build_model(choice, seed=0).train()
    batch, *_ = batches(tools(tmp_path).calibration(), out / "tokenizer.json", 0)
    before = {name: model.get_parameter(name).detach().clone() for name in (E, ALL)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        objective(model, batch, hidden_states(model, batch), torch.Generator()).backward()
        optimizer.step()
    for name, tensor in before.items():
        after = model.get_parameter(name)
        assert (after == 0).equal(tensor == 0)
        assert removed(after).equal(removed(tensor))
        assert removed(after).float().mean() > 0.6
        assert (after != tensor)[~removed(tensor)].float().mean() > 0.3  # of W_all, layers use some rows alone


def test_what_was_removed_before_is_removed_again(tmp_path: Path) -> None:
    first, _ = pruned(tmp_path, tiny_export(tmp_path / "source"), method="magnitude", sparsity=0.5, centre=True)
    again, notes = pruned(tmp_path, first, name="again", method="magnitude", sparsity=0.7, centre=True, scope="matrix")
    before, after = (load_model(folder).get_parameter(E) for folder in (first, again))
    assert removed(after)[removed(before)].all()
    assert after.mode(0).values.equal(before.mode(0).values)
    assert notes[f"removed of {E}"] == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize(
    ("keys", "starts", "count"),
    [
        ({"sharing": "layers"}, "layers.0.", 6),
        ({"sharing": "none"}, "layers.", 12),
        ({"sharing": "low_rank", "rank": 4}, "", 12),
    ],
)
@pytest.mark.parametrize("method", ["magnitude", "surgeon"])
def test_matrices_that_no_embedding_generates_are_pruned_too(
    tmp_path: Path, keys: dict[str, Any], starts: str, count: int, method: str
) -> None:
    source = tiny_export(tmp_path / "source", **keys)
    how: dict[str, Any] = {"gradients": 8, "block": 4, "recomputations": 1}
    out, notes = pruned(tmp_path, source, method=method, sparsity=0.6, scope="matrix", **how)
    model = load_model(out)
    own = {name: p for name, p in model.named_parameters() if name.startswith("sharebert.sharing.")}
    pooler = [own.pop(name) for name in list(own) if ".pooler" in name]
    matrices = {name: p for name, p in own.items() if name.startswith(f"sharebert.sharing.{starts}")}
    assert len(matrices) == len(own) == count
    keep_zeros(model)
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    for name, matrix in {**matrices, E: model.get_parameter(E)}.items():
        assert (matrix == 0).sum() == round(0.6 * matrix.numel())
        assert matrix.grad is not None
        assert (matrix.grad == 0).equal(matrix == 0)
        assert f"{name}.mask" in load_file(out / "model.safetensors")
    assert all(matrix.all() for matrix in pooler)
    assert notes["removed of the layers' matrices"] == pytest.approx(0.6, abs=0.005)


def test_sparsity_0_stores_the_zeros_that_are_there(tmp_path: Path) -> None:
    source = tiny_export(tmp_path / "source")
    first, _ = pruned(tmp_path, source, method="magnitude", sparsity=0.6)
    export = read_export(first)
    dense = {name: value for name, value in export.other_keys.items() if name != "sparse"}
    import dataclasses

    write_export(dataclasses.replace(export, other_keys=dense), tmp_path / "whole")
    again, _ = pruned(tmp_path, tmp_path / "whole", name="again", sparsity=0)
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_damage_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file

    source = tiny_export(tmp_path / "source")
    out, _ = pruned(tmp_path, source, method="magnitude")
    tensors = load_torch(out / "model.safetensors")
    tensors[f"{E}.values"] = tensors[f"{E}.values"][:-1].clone()
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(BadInput, match=f"{E}: not the sparse tensor"):
        read_export(out)


@pytest.mark.parametrize(
    ("keys", "changes", "message"),
    [
        ({"scope": "2:4", "sparsity": 0.7}, {}, "scope 2:4 removes half"),
        ({"method": "movement"}, {"mlm_head": "none"}, "no masked-language-model head; use surgeon"),
        ({"method": "wanda"}, {"sharing": "eps"}, "wanda takes a model with sharing: veps"),
        ({"method": "wanda"}, {"intermediate_size": 20, "ffn_pairs": 2}, "and one feed-forward pair; use surgeon"),
    ],
)
def test_wrong_keys_are_one_line(tmp_path: Path, keys: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        PruneWeights(**keys).check(open_source(tiny_export(tmp_path / "source", **changes)))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    from compress.steps import step_of

    with pytest.raises(BadInput, match="sparsity"):
        step_of({"prune_weights": {"sparsity": sparsity}}, "steps[0]")


@pytest.mark.parametrize("sharing", ["layers", "none", "eps"])
def test_sparsity_0_scores_nothing_and_takes_every_model(tmp_path: Path, sharing: str) -> None:
    PruneWeights(sparsity=0).check(open_source(tiny_export(tmp_path / "source", sharing=sharing)))


def test_a_column_that_nothing_was_removed_from_gets_its_mean(tmp_path: Path) -> None:
    """The file is sparse, and holds no zeros."""
    source = tiny_export(tmp_path / "source")
    first, _ = pruned(tmp_path, source, method="magnitude", sparsity=0)
    out, _ = pruned(tmp_path, first, name="again", method="magnitude", sparsity=0.5, scope="matrix", centre=True)
    means = load_model(source).get_parameter(E).mean(0)
    torch.testing.assert_close(load_model(out).get_parameter(E).mode(0).values, means)
