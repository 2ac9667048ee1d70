"""The loss does not depend on how a batch is cut; every stage and precision trains, saves, goes on, and exports."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from conftest import make_dataset
from tiny_models import tiny_model
from tiny_runs import log_of, losses, train_arguments, train_many, whole

from exports.export import Export
from exports.forms import write_export
from pretrain.checkpoint import format as checkpoint
from pretrain.engine.fragments import STATES

STEPS = 200
"""Of the comparison of ranks."""

STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16")


def worst_difference(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b)
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def cut_runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on 1, 2 and 3 ranks, with and without accumulation."""
    folder = tmp_path_factory.mktemp("cut")
    for world_size, micro_batches in ((1, (10, 3)), (2, (10, 2)), (3, (10,))):
        plan = [
            {
                "overrides": train_arguments(
                    dataset,
                    folder / f"{world_size}-{micro}",
                    steps=STEPS,
                    data__micro_batch=micro,
                    validate__every=100,
                    validate__block=5,
                )
            }
            for micro in micro_batches
        ]
        train_many(plan, world_size, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1-3", "2-10", "2-2", "3-10"])
def test_ranks_and_accumulation_do_not_change_the_loss(cut_runs: Path, name: str) -> None:
    reference, other = losses(cut_runs / "1-10"), losses(cut_runs / name)
    assert len(reference) == STEPS
    assert mean(reference[-20:]) < mean(reference[:20]) - 0.3, "it did not learn, so equal losses say nothing"
    assert worst_difference(other, reference) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1-3", "2-10", "3-10"])
def test_validation_before_training_is_one_number(cut_runs: Path, name: str) -> None:
    def first(run: str) -> tuple[float, float]:
        line = next(line for line in log_of(cut_runs / run) if "valid_loss" in line)
        return line["valid_loss"], line["valid_accuracy"]

    assert first(name) == first("1-10")


@pytest.fixture(scope="module")
def matrix(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each stage and precision on 2 ranks: 20 steps; the same cut off after 10 and gone on with; loaded elsewhere."""
    folder = tmp_path_factory.mktemp("matrix")
    plan: list[dict[str, Any]] = []
    for stage in STAGES:
        for precision in PRECISIONS:
            run = folder / f"{stage}-{precision}"
            extra: dict[str, Any] = {"zero__stage": stage, "precision": precision, "checkpoint__every": 10}
            extra |= {"model__hidden_dropout_prob": 0.1}
            if stage == 3:
                extra["zero__stage3_param_persistence_threshold"] = 0
            plan.append({"overrides": train_arguments(dataset, run, **extra)})
            on = Path(f"{run}-on")
            plan.append({"overrides": train_arguments(dataset, on, **extra), "copy": [str(run), 10]})
            plan.append({"overrides": train_arguments(dataset, on, **extra), "save_again": True})
    few_lines = {"zero__stage": 2, "checkpoint__every": 10, "monitor__every": 6, "data__micro_batch": 2}
    few_lines |= {"model__hidden_dropout_prob": 0.1}
    plan.append({"overrides": train_arguments(dataset, folder / "few-lines", **few_lines)})
    on = train_arguments(dataset, folder / "few-lines-on", **few_lines)
    plan.append({"overrides": on, "copy": [str(folder / "few-lines"), 10]})
    unknown = make_dataset(folder / "unknown", unknown=True)
    plan.append({"overrides": train_arguments(unknown, folder / "nothing-to-predict", steps=2)})
    write_export(
        Export.of_model(tiny_model(vocab_size=304, max_position_embeddings=32, num_attention_heads=4)),
        folder / "export",
    )
    for wrong, said in (
        ({"data__whole_word": True}, "data.whole_word: "),
        ({"model__init_from": folder / "export"}, "model.init_from: "),
    ):  # each rank finds it alone, and all refuse it together: one line is printed, and no rank waits
        refused = {"overrides": train_arguments(dataset, folder / "refused", **wrong)}
        plan.append(refused | {"error": f"pretrain.distributed.Refused: {said}"})
    train_many(plan, 2, folder)
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_bit_for_bit(matrix: Path, stage: int, precision: str) -> None:
    run = matrix / f"{stage}-{precision}"
    undisturbed, resumed = losses(run), losses(Path(f"{run}-on"))
    assert len(undisturbed) == 20
    assert resumed == undisturbed


def test_a_line_of_steps_before_and_after_a_resume_is_that_of_an_undisturbed_run(matrix: Path) -> None:
    undisturbed, resumed = log_of(matrix / "few-lines"), log_of(matrix / "few-lines-on")
    keys = ("step", "loss", "accuracy", "lr", "grad_norm")
    assert [line["step"] for line in resumed] == [6, 12, 18, 20], "the checkpoint is of step 10"
    assert [[line[key] for key in keys] for line in resumed] == [[line[key] for key in keys] for line in undisturbed]
    assert len(whole(matrix / "few-lines-on", 20).training["interval"]) == 3


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_loaded_weights_and_moments_are_those_saved(matrix: Path, stage: int, precision: str) -> None:
    run = Path(f"{matrix / f'{stage}-{precision}'}-on")
    saved, again = whole(run, 20), whole(run, 20, "again")
    assert saved.manifest["shapes"] == again.manifest["shapes"]
    assert saved.training["adam_steps"] == again.training["adam_steps"] == 20
    for name in saved.manifest["shapes"]:
        for state in STATES:
            assert torch.equal(checkpoint.read_whole(saved, name, state), checkpoint.read_whole(again, name, state)), (
                f"{state} of {name}"
            )


@pytest.mark.parametrize("stage", STAGES)
def test_the_slices_of_all_ranks_cover_each_element_once(matrix: Path, stage: int) -> None:
    saved = whole(matrix / f"{stage}-fp32", 20)
    assert saved.world_size == 2
    for name, parts in saved.pieces().items():
        end = 0
        for _, start, length in parts:
            assert start == end, f"{name} at {start}"
            end += length
        assert end == math.prod(saved.manifest["shapes"][name]), name


def test_steps_in_which_no_word_is_masked_have_no_gradient(matrix: Path) -> None:
    """The gradient is 0, and there is no loss to log."""
    lines = log_of(matrix / "nothing-to-predict")
    assert [(line["step"], line["grad_norm"], line["skipped"]) for line in lines] == [(1, 0.0, 0), (2, 0.0, 0)]
    assert not any("loss" in line for line in lines)


def test_stages_agree(matrix: Path) -> None:
    """One step's arithmetic is the same at every stage, so the masters are, up to rounding."""
    reference = whole(matrix / "0-fp32", 10)
    for stage in (1, 2, 3):
        other = whole(matrix / f"{stage}-fp32", 10)
        for name in reference.manifest["shapes"]:
            if "key_bias" in name:
                continue  # its true gradient is zero: Adam makes steps of the rounding
            torch.testing.assert_close(
                checkpoint.read_whole(other, name), checkpoint.read_whole(reference, name), atol=2e-5, rtol=1e-3
            )
