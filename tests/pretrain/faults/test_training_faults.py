"""Faults of the training under every ZeRO stage: skipped steps, rows to skip, giving up, a slow rank, memory."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import log_of, losses, train_arguments, train_many

from pretrain.checkpoint import format as checkpoint

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
STEPS = 14
CASES = [(stage, "fp32") for stage in STAGES] + [(2, "bf16"), (3, "bf16")]


@pytest.fixture(scope="module")
def runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fault in every case, on 2 ranks; `said` holds what they said."""
    folder = tmp_path_factory.mktemp("faults")
    plan: list[dict[str, Any]] = []

    def add(name: str, case: tuple[int, str], fault: dict[str, Any], **extra: Any) -> None:
        stage, precision = case
        keys = {"zero__stage": stage, "precision": precision, "steps": STEPS, "checkpoint__every": 5} | extra
        keys["model__hidden_dropout_prob"] = 0.1
        run = folder / f"{name}-{stage}-{precision}"
        plan.append({"overrides": train_arguments(dataset, run, **keys), **fault})

    for case in CASES:
        add("clean", case, {}, faults__memory_probe=False)
        add("dry", case, {}, faults__memory_probe=True)
        add("skip", case, {"bad_steps": [5, 7]})
        add("back", case, {"bad_rows": [61, 88]}, faults__max_skipped=3)
    failed = {"error": "returning to step 5 2 times did not help"}
    add("end", (1, "fp32"), {"bad_steps": [6, 99], **failed}, faults__max_skipped=2, faults__max_returns=2)
    nothing = {"error": "there is no checkpoint to return to; start the run again: rows 10 to 29 of the order"}
    add("start", (2, "fp32"), {"bad_rows": [10, 30], **nothing}, faults__max_skipped=2)
    add("start", (2, "fp32"), {"bad_rows": [10, 30]}, faults__max_skipped=2)
    add("slow", (1, "fp32"), {"slow_s": 0.1})
    (folder / "said").write_text(train_many(plan, 2, folder))
    return folder


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_memory_probe_changes_nothing(runs: Path, stage: int, precision: str) -> None:
    clean = losses(runs / f"clean-{stage}-{precision}")
    assert len(clean) == STEPS
    assert losses(runs / f"dry-{stage}-{precision}") == clean


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_step_that_is_not_finite_is_skipped(runs: Path, stage: int, precision: str) -> None:
    """On all ranks, though the loss of one alone was no number; its rows and learning rate are used up."""
    run, clean = runs / f"skip-{stage}-{precision}", runs / f"clean-{stage}-{precision}"
    lines, undisturbed = log_of(run), log_of(clean)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "loss" not in line] == [5, 6]
    assert [line["step"] for line in lines if "grad_norm" not in line] == [5, 6]
    assert [line["skipped"] for line in lines] == [0] * 4 + [1] + [2] * (STEPS - 5)
    assert [(line["rows"], line["lr"]) for line in lines] == [(line["rows"], line["lr"]) for line in undisturbed]
    assert [line.get("loss") for line in lines[:4]] == [line["loss"] for line in undisturbed[:4]]
    # The checkpoint due at 5 waits until the state is known to be good.
    assert [folder.name for folder in checkpoint.found(run / "checkpoints")] == [
        checkpoint.folder_name(step) for step in (STEPS, 10, 7)
    ]
    last = checkpoint.read_manifest(run / "checkpoints" / checkpoint.folder_name(STEPS))
    assert last.training["adam_steps"] == STEPS - 2
    assert "step 6: the gradient is not finite; skipped, 2 in a row (rows 50 to 59 of the order)" in said(runs, run)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_after_too_many_it_goes_back_and_passes_over_the_rows(runs: Path, stage: int, precision: str) -> None:
    run, clean = runs / f"back-{stage}-{precision}", runs / f"clean-{stage}-{precision}"
    (given_up,) = [json.loads(line) for line in (run / "bad_rows.jsonl").read_text().splitlines()]
    assert given_up == {"first": 60, "end": 90, "step": 9, "back_to": 5}
    lines = log_of(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "lines after step 5 are written once"
    assert all("loss" in line for line in lines)
    assert [line["rows"] for line in lines] == [10 * s for s in range(1, 7)] + [10 * s for s in range(10, STEPS + 4)]
    assert losses(run)[:6] == losses(clean)[:6], "step 6 is made again, and is the same"
    assert "step 9: 3 steps in a row were not finite; returning to step 5; rows 60 to 89 of the order" in said(
        runs, run
    )


@pytest.mark.parametrize("fault", ["skip", "back"])
def test_stages_agree(runs: Path, fault: str) -> None:
    reference = log_of(runs / f"{fault}-0-fp32")
    for stage in STAGES[1:]:
        for line, expected in zip(log_of(runs / f"{fault}-{stage}-fp32"), reference, strict=True):
            assert line["step"] == expected["step"]
            assert line.get("loss", 0) == pytest.approx(expected.get("loss", 0), rel=1e-5), f"stage {stage}, {line}"


def test_a_run_that_cannot_be_helped_ends_with_a_report(runs: Path) -> None:
    run = runs / "end-1-fp32"
    state = json.loads((run / "state.json").read_text())
    assert state["state"] == "failed"
    assert "step 7: 2 steps in a row were not finite, and returning to step 5 2 times did not help" in state["reason"]
    assert str(run / "bad_rows.jsonl") in state["reason"]
    entries = [json.loads(line) for line in (run / "bad_rows.jsonl").read_text().splitlines()]
    assert [(entry["first"], entry["end"]) for entry in entries] == [(50, 70), (50, 90)]


def test_before_the_first_checkpoint_the_next_start_passes_over_the_rows(runs: Path) -> None:
    state = json.loads((runs / "start-2-fp32" / "state.json").read_text())
    assert (state["state"], state["restarts"], state["crashes"]) == ("finished", 1, {"2": 1})
    assert log_of(runs / "start-2-fp32")[-1]["rows"] == STEPS * 10 + 20


def test_a_slow_rank_is_named(runs: Path) -> None:
    lines = log_of(runs / "slow-1-fp32")
    assert all(line["slowest_rank_factor"] > 2 for line in lines)
    named = [line for line in said(runs, runs / "slow-1-fp32").splitlines() if "is slow" in line]
    assert len(named) == 1
    assert f"step 3: rank 1 on {platform.node()} is slow: rows and forward passes take it" in named[0]
    assert "is slow" not in said(runs, runs / "clean-0-fp32")


def said(runs: Path, run: Path) -> str:
    """The lines of one run."""
    return "\n".join(line for line in (runs / "said").read_text().splitlines() if line.startswith(f"{run}: "))


def test_memory_that_does_not_suffice_shows_at_the_start(dataset: Path, tmp_path: Path) -> None:
    """The address space is limited to what is mapped after the imports, and 2 GB more; the step takes more."""
    code = (
        "import re, resource, sys; from pathlib import Path; from pretrain.__main__ import launch\n"
        "import torch, pretrain.train; from pretrain.engine.deepspeed_import import import_deepspeed\n"
        "import_deepspeed()\n"
        "torch.set_num_threads(1)\n"
        "used = int(re.search(r'VmSize:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 2**30,) * 2)\n"
        "sys.exit(launch(None, sys.argv[1:], debug=False))\n"
    )
    arguments = train_arguments(dataset, tmp_path / "run", data__global_batch=40_000, data__micro_batch=40_000)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "data.prefetch=1"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "data.micro_batch: a step with 40000 rows at once does not fit into memory" in done.stderr
    assert "lower data.micro_batch" in done.stderr
    assert done.returncode == 2
    assert not (tmp_path / "run" / "log.jsonl").exists()
