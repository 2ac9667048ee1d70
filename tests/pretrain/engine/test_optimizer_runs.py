"""Muon's steps, groups and averages in runs on two ranks, computed again from their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import log_of, losses, train_arguments, train_many, whole
from torch import Tensor

import sharebert_cli
from exports.dense import read_dense
from exports.read import load_model
from pretrain.checkpoint.format import Checkpoint, read_whole
from pretrain.data.datasets import DataRecipe, WeightedDataset, open_datasets
from pretrain.engine.muon import orthogonalise
from pretrain.export.consolidate import consolidate
from pretrain.objective import MaskedLanguageModelling
from pretrain.validate import ValidateRecipe, validate
from sharebert_common.errors import BadInput

STEPS, LR, CLIP, DECAY = 6, 0.05, 0.004, 0.6
KEYS: dict[str, Any] = {
    "steps": STEPS,
    "model__sharing": "none",
    "data__global_batch": 8,
    "data__micro_batch": 2,
    "data__mask_rate": 0.3,
    "data__mask_schedule__last_rate": 0.15,
    "schedule__decay": "constant",
    "schedule__warmup": 1,
    "optimizer__clip": 0.0,
    "optimizer__muon__matrices": True,
    "optimizer__muon__lr": LR,
    "optimizer__muon__momentum": 0.9,
    "optimizer__muon__weight_decay": 0.1,
    "optimizer__groups__matrices__clip": CLIP,
    "optimizer__groups__vectors__lr_factor": 0.0,
    "optimizer__groups__factor_linear__lr_factor": 2.0,
    "checkpoint__every": 1,
    "checkpoint__keep": 9,
}
AVERAGED = KEYS | {"optimizer__ema__decay": DECAY, "optimizer__ema__start": 2}
HALF = 3
SKIPPED = 3
PLAIN: dict[str, Any] = {
    "data__global_batch": 8,
    "data__micro_batch": 2,
    "schedule__decay": "constant",
    "checkpoint__every": 1,
    "checkpoint__keep": 9,
}
BEGUN: dict[str, Any] = {"optimizer__muon__generated": True, "optimizer__ema__decay": DECAY}
MATRICES = ("sharebert.sharing.layers.0.query", "sharebert.sharing.layers.1.intermediate")
LINEAR = "sharebert.factor_linear.weight"


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two ranks: a run at each stage, three with averages that are validated, the same three with a step that is
    skipped and averages from the first step on, and `begun`: half of a plain run that is resumed with Muon on generated
    matrices and an average. `said` has what was said."""
    folder = tmp_path_factory.mktemp("optimizer")
    plan = [
        {"overrides": train_arguments(dataset, folder / f"zero-{stage}", **KEYS, zero__stage=stage)}
        for stage in (0, 1, 2)
    ]
    validated = AVERAGED | {"validate__every": 2, "validate__ema": True, "validate__rows": 16}
    for stage in (0, 2, 3):
        given = validated | {"zero__stage": stage}
        if stage == 3:
            given |= {
                "optimizer__muon__matrices": False,
                "optimizer__groups__matrices__clip": 0.0,
                "model__sharing": "veps",
            }
        plan.append({"overrides": train_arguments(dataset, folder / f"averaged-{stage}", **given)})
        given |= {"optimizer__ema__start": 0, "validate__every": 0}
        skipping = train_arguments(dataset, folder / f"skipping-{stage}", **given)
        plan.append({"overrides": skipping, "bad_steps": [SKIPPED, SKIPPED + 1]})
    plan.append({"overrides": train_arguments(dataset, folder / "plain", **PLAIN, steps=HALF)})
    begun = train_arguments(dataset, folder / "begun", **PLAIN, **BEGUN, steps=STEPS)
    plan.append({"overrides": begun, "copy": [str(folder / "plain"), HALF], "save_again": True})
    plan.append({"overrides": begun})
    (folder / "said").write_text(train_many(plan, 2, folder))
    return folder


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", [*MATRICES, LINEAR])
def test_a_step_is_the_orthogonal_momentum(runs: Path, stage: int, name: str) -> None:
    """Nesterov's sum of gradient and momentum, made orthogonal, times rate and scale, after the decay."""
    for step in range(2, STEPS + 1):
        before, after = (whole(runs / f"zero-{stage}", at) for at in (step - 1, step))
        weight, momentum = (read_whole(after, name, state) for state in ("weight", "momentum"))
        gradient = momentum - 0.9 * read_whole(before, name, "momentum")
        scale = max(1, weight.shape[0] / weight.shape[1] if name == LINEAR else weight.shape[1] / weight.shape[0])
        lr = 2 * LR if name == LINEAR else LR
        wanted = read_whole(before, name) * (1 - lr * 0.1)
        wanted = wanted - lr * scale**0.5 * orthogonalise(gradient + 0.9 * momentum, 5)
        torch.testing.assert_close(weight, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_group_clips_over_all_ranks(runs: Path, stage: int) -> None:
    """The first momentum is the first gradient; the group is longer than the clip."""
    first = whole(runs / f"zero-{stage}", 1)
    names = [name for name in first.manifest["shapes"] if name.startswith("sharebert.sharing.")]
    squares = sum(float(read_whole(first, name, "momentum").double().square().sum()) for name in names)
    assert squares**0.5 == pytest.approx(CLIP, rel=1e-3)


def test_a_rate_of_zero_holds_a_group(runs: Path) -> None:
    first, last = whole(runs / "zero-1", 1), whole(runs / "zero-1", STEPS)
    bias = "sharebert.layers.0.query_bias"
    assert torch.equal(read_whole(first, bias), read_whole(last, bias))
    assert not torch.equal(*(read_whole(c, "sharebert.word_embeddings.weight") for c in (first, last)))
    assert log_of(runs / "zero-1")[-1]["lr"] == 3e-3, "the log has optimizer.lr"


def test_stages_agree_and_validation_of_the_average_leaves_the_training_alone(runs: Path) -> None:
    reference = losses(runs / "zero-0")
    for run in ("zero-1", "zero-2"):
        assert losses(runs / run) == pytest.approx(reference, rel=1e-5)
    assert losses(runs / "averaged-0") == reference
    assert losses(runs / "averaged-2") == losses(runs / "zero-2")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_average_is_that_of_the_weights_after_each_step(runs: Path, stage: int) -> None:
    run = runs / f"averaged-{stage}"
    last = whole(run, STEPS)
    assert last.training["ema_steps"] == STEPS - 2
    for name in last.manifest["shapes"]:
        wanted = torch.zeros(())
        for number, step in enumerate(range(3, STEPS + 1)):
            decay = min(DECAY, number / (number + 1))
            wanted = decay * wanted + (1 - decay) * read_whole(whole(run, step), name)
        torch.testing.assert_close(read_whole(last, name, "ema"), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_neither_a_skipped_step_nor_the_memory_probe_is_in_the_average(runs: Path, stage: int) -> None:
    """The probe is a step before the first one, which is skipped as well."""
    run = runs / f"skipping-{stage}"
    last = whole(run, STEPS)
    assert [line["skipped"] for line in log_of(run)] == [0, 0, 1, 1, 1, 1]
    assert last.training["ema_steps"] == STEPS - 1
    for name in last.manifest["shapes"]:
        wanted = torch.zeros(())
        for number, step in enumerate(step for step in range(1, STEPS + 1) if step != SKIPPED):
            decay = min(DECAY, number / (number + 1))
            wanted = decay * wanted + (1 - decay) * read_whole(whole(run, step), name)
        torch.testing.assert_close(read_whole(last, name, "ema"), wanted, rtol=1e-5, atol=1e-7)


def test_momenta_and_an_average_may_begin_at_a_resume(runs: Path) -> None:
    """Both are 0 when the run is loaded; then it trains, and both take in the steps since."""
    run, said = runs / "begun", (runs / "said").read_text()
    assert f"checkpoint of step {HALF} has no momenta of Muon: they start at 0 (of generated." in said
    assert f"checkpoint of step {HALF} has no average of the weights: it begins anew" in said
    loaded = whole(run, HALF, "again")
    assert loaded.training["ema_steps"] == 0
    for name in loaded.manifest["shapes"]:
        assert torch.equal(read_whole(loaded, name), read_whole(whole(runs / "plain", HALF), name))
        assert not read_whole(loaded, name, "ema").any()
    assert all(not momentum.any() for momentum in momenta(loaded).values())

    assert len(losses(run)) == STEPS
    assert losses(run)[:HALF] == losses(runs / "plain")
    last = whole(run, STEPS)
    assert last.training["ema_steps"] == STEPS - HALF
    assert momenta(last).keys() == momenta(loaded).keys()
    assert all(momentum.any() for momentum in momenta(last).values())
    for name in last.manifest["shapes"]:
        wanted = read_whole(whole(run, HALF + 1), name)
        for step, decay in ((HALF + 2, 1 / 2), (HALF + 3, DECAY)):
            wanted = decay * wanted + (1 - decay) * read_whole(whole(run, step), name)
        torch.testing.assert_close(read_whole(last, name, "ema"), wanted, rtol=1e-5, atol=1e-7)


def momenta(saved: Checkpoint) -> dict[str, Tensor]:
    """The momenta of generated matrices in a checkpoint, by name and start of the fragment."""
    tensors = [load_file(file) for file in saved.folder.glob("*.safetensors")]
    assert len(tensors) == 2
    return {f"{rank} {key}": t for rank, part in enumerate(tensors) for key, t in part.items() if "generated." in key}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_validation_and_the_export_use_the_average(runs: Path, dataset: Path, tmp_path: Path, stage: int) -> None:
    run = runs / f"averaged-{stage}"
    out = consolidate(run, tmp_path / "export", ema=True)
    last = whole(run, STEPS)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, read_whole(last, name, "ema")), name
    card = (out / "README.md").read_text()
    assert "the moving average over 4 steps" in card
    score = validate(
        MaskedLanguageModelling(torch.device("cpu")),
        load_model(out).eval(),
        open_datasets(DataRecipe(dataset=[WeightedDataset(path=str(dataset))], global_batch=8, micro_batch=2)),
        ValidateRecipe(rows=16),
        mask_rate=0.15,  # that of the last step, whatever the step
        whole_word=False,
    )
    logged = [line["valid_loss"] for line in log_of(run) if "valid_loss" in line]
    assert len(logged) == 4
    assert logged[-1] == pytest.approx(score.loss, rel=1e-5)
    assert f"after step {STEPS}: loss {logged[-1]:.4f} nats" in card


def test_the_average_in_the_dense_form(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command writes the function of the compact export of the average, and not that of the weights."""
    run, dense = runs / "averaged-3", tmp_path / "dense"
    assert sharebert_cli.main(["consolidate", str(run), str(dense), "--form", "dense", "--ema"]) == 0
    assert capsys.readouterr().out == f"{dense}\n"
    averaged, plain = (load_model(consolidate(run, tmp_path / str(ema), ema=ema)).eval() for ema in (True, False))
    tokens = torch.arange(5, 23).view(2, 9)
    found = read_dense(dense, averaged.config)(tokens).logits
    largest = found.abs().max()
    assert (found - averaged.logits(tokens)).abs().max() < 1e-6 * largest
    assert (found - plain.logits(tokens)).abs().max() > 1e-4 * largest
    assert "the moving average over 4 steps" in (dense / "README.md").read_text()
    before = next(line for line in log_of(run) if "valid_loss" in line and line["step"] == 2)
    card = (tmp_path / "False" / "README.md").read_text()  # the last validation of the weights themselves
    assert f"after step 2: loss {before['valid_loss']:.4f} nats" in card


def test_a_run_without_an_average_has_none_to_export(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no average of the weights \(--ema\)"):
        consolidate(runs / "zero-1", tmp_path / "export", ema=True)
