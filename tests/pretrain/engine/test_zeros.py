"""`model.keep_zeros`: the zeros of a pruned model stay through a real training, and its export stays as small."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from tiny_runs import train_arguments, train_many

from compress.prune.weights_step import PruneWeights
from compress.source import open_source
from exports.export import Export
from exports.forms import write_export
from exports.read import load_model
from pretrain.engine.zeros import _where_kept
from pretrain.export.consolidate import consolidate
from pretrain.recipe import TrainRecipe
from sharebert.packed import ROTATED
from sharebert_common.errors import BadInput
from sharebert_common.recipe import load

RUNS: dict[str, dict[str, Any]] = {
    "zero-1": {"model__keep_zeros": True},
    "zero-2": {"model__keep_zeros": True, "zero__stage": 2, "precision": "bf16", "data__micro_batch": 3},
    "not kept": {},
}


def pruned(source: Path, out: Path, sparsity: float) -> Path:
    PruneWeights(method="magnitude", sparsity=sparsity).apply(
        open_source(source),
        SimpleNamespace(),
        out,  # type: ignore[arg-type]  # no rows are needed
    )
    return out


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings of a pruned model on two ranks, in one launch."""
    folder = tmp_path_factory.mktemp("zeros")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = tiny_model(vocab_size=301, max_position_embeddings=32, mlm_head="tied", **sizes)
    write_export(Export.of_model(model, tokenizer=dataset / "tokenizer.json"), folder / "source")
    start = {"model__init_from": pruned(folder / "source", folder / "pruned", 0.7), "steps": 6}
    plan = [{"overrides": train_arguments(dataset, folder / name, **start, **keys)} for name, keys in RUNS.items()]
    train_many(plan, 2, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero-1", "zero-2"])
def test_zeros_stay_and_other_weights_learn(runs: Path, tmp_path: Path, name: str) -> None:
    trained = consolidate(runs / name, tmp_path / "trained")
    before, after = load_model(runs / "pruned"), load_model(trained)
    for matrix in ROTATED:
        old, new = before.get_parameter(matrix).detach(), after.get_parameter(matrix).detach()
        assert (new == 0).equal(old == 0)
        assert (new != old).any()
    files = [load_file(folder / "model.safetensors") for folder in (runs / "pruned", trained)]
    for matrix in ROTATED:
        assert files[0][f"{matrix}.mask"].equal(files[1][f"{matrix}.mask"])
    sizes = [sum(tensor.nbytes for tensor in file.values()) for file in files]
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_without_the_key_they_do_not_stay(runs: Path, tmp_path: Path) -> None:
    model = load_model(consolidate(runs / "not kept", tmp_path / "trained"))
    zeros = [float((model.get_parameter(matrix) == 0).float().mean()) for matrix in ROTATED]
    assert max(zeros) < 0.6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"zero__stage": 3}, r"model\.keep_zeros: not with zero\.stage 3, .* use stage 2"),
        ({"optimizer__muon__generated": True}, r"model\.keep_zeros: not with optimizer\.muon, which"),
        ({"optimizer__muon__matrices": True}, r"model\.keep_zeros: not with optimizer\.muon, which"),
    ],
)
def test_what_cannot_keep_them_is_refused(dataset: Path, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    recipe = load(TrainRecipe, None, train_arguments(dataset, tmp_path / "run", model__keep_zeros=True, **keys))
    with pytest.raises(BadInput, match=message):
        recipe.resolve()


def test_rows_follow_the_model_to_another_device() -> None:
    """The model is built on the CPU, and trained elsewhere."""
    rows, elsewhere = torch.tensor([0, -1, 1]), torch.empty(4, 3, device="meta")
    assert _where_kept(elsewhere, rows, elsewhere).device.type == "meta"
