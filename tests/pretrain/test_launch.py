"""`python -m pretrain` as a user starts it: it goes on by itself, stops when asked, and refuses bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_runs import log_of, losses, torchrun, train_arguments

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def pretrain(recipe: Path, arguments: Sequence[str], world_size: int = 1) -> subprocess.CompletedProcess[str]:
    start = [sys.executable] if world_size == 1 else torchrun(world_size)
    return subprocess.run(
        [*start, "-m", "pretrain", str(recipe), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=ENVIRONMENT,
        check=False,
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text("precision: fp32\n")
    return file


def points(run: Path, tag: str) -> list[tuple[int, float]]:
    """A curve as TensorBoard's own reader shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_a_stopped_run_goes_on_by_itself(dataset: Path, recipe: Path, tmp_path: Path) -> None:
    """One process: stopped by a signal, exit code 75; started again, the losses are those of an undisturbed run."""
    arguments = {"steps": 120, "validate__every": 40, "model__hidden_dropout_prob": 0.1}
    whole = tmp_path / "whole"
    assert pretrain(recipe, train_arguments(dataset, whole, **arguments)).returncode == 0

    run = tmp_path / "run"
    command = [sys.executable, "-m", "pretrain", str(recipe), *train_arguments(dataset, run, **arguments)]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (run / "log.jsonl").exists() and len(log_of_so_far(run)) > 5)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75
    state = json.loads((run / "state.json").read_text())
    assert state["state"] == "stopped"
    assert state["reason"] == "signal SIGTERM"
    assert 5 < state["step"] < 120
    assert [folder.name for folder in (run / "checkpoints").glob("step-*")] == [f"step-{state['step']:08d}"]

    assert pretrain(recipe, train_arguments(dataset, run, **arguments)).returncode == 0
    assert losses(run) == losses(whole)
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["step"], state["restarts"]) == ("finished", 120, 1)

    steps = [step for step, _ in points(run, "train/loss")]
    assert steps == list(range(1, 121)), "the curve has a gap or an overlap"
    assert points(run, "valid/loss") == points(whole, "valid/loss")
    assert [step for step, _ in points(run, "valid/accuracy")] == [0, 40, 80, 120]
    for tag in ("train/lr", "train/grad_norm", "train/loss_scale", "train/accuracy", "speed/tokens_per_s"):
        assert len(points(run, tag)) == 120, tag

    again = pretrain(recipe, train_arguments(dataset, run, **arguments))
    assert again.returncode == 0
    assert losses(run) == losses(whole), "a finished run is left as it is"


def test_tensorboard_shows_the_config(dataset: Path, recipe: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert pretrain(recipe, train_arguments(dataset, run, steps=2)).returncode == 0
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    (event,) = board.Tensors("config/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert (run / "config.yaml").read_text().strip() in text
    environment = json.loads((run / "environment.json").read_text())
    assert environment[0]["packages"]["torch"]
    assert environment[0]["ranks"] == 1


def test_under_torchrun_a_stop_is_no_failure(dataset: Path, recipe: Path, tmp_path: Path) -> None:
    """Two ranks, stopped by the file; torchrun would start the group again on any code but 0."""
    run = tmp_path / "run"
    arguments = [*train_arguments(dataset, run, steps=100_000), "schedule.warmup=10"]
    command = [*torchrun(2), "-m", "pretrain", str(recipe), *arguments]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: (run / "log.jsonl").exists() and len(log_of_so_far(run)) > 3)
        second = pretrain(recipe, arguments)
        assert second.returncode == 2
        assert "in use by another attempt of this run (pid" in second.stderr
        (run / "stop").touch()
        process.communicate(timeout=60)
    assert process.returncode == 0
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["reason"]) == ("stopped", "file 'stop'")
    assert (run / "checkpoints" / f"step-{state['step']:08d}" / "manifest.json").is_file()


def log_of_so_far(run: Path) -> list[object]:
    try:
        return list(log_of(run))
    except ValueError:
        return []  # a line is being written


def wait_for(condition: object, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


BAD = {
    "an unknown key": (["data.globl_batch=3"], "data.globl_batch: unknown key; did you mean 'global_batch'?"),
    "an unknown model key": (["model.hiden_size=3"], "hiden_size: unknown key; did you mean 'hidden_size'?"),
    "an unknown size": (["model.size=sharebert-smal"], "no size 'sharebert-smal'; did you mean 'sharebert-small'?"),
    "an unknown ZeRO key": (["zero.overlap_com=true"], "zero.overlap_com: unknown key; did you mean 'overlap_comm'?"),
    "a stage that is none": (["zero.stage=4"], "zero.stage: 4 is no ZeRO stage"),
    "a missing dataset": (["data.dataset=nowhere"], "nowhere/manifest.json: no dataset here"),
    "a vocabulary too small": (["model.hidden_size=64"], "vocab_size 304 is too small for hidden_size H = 64"),
    "heads that do not divide": (["model.num_attention_heads=5"], "num_attention_heads (5) must divide hidden_size"),
    "another vocabulary": (["model.vocab_size=288"], "vocab_size: 288, and the dataset's tokenizer has 301 words"),
    "too few positions": (["model.max_position_embeddings=8"], "max_position_embeddings: 8, and the dataset's rows"),
    "fp16 on a CPU": (["precision=fp16"], "fp16 needs a CUDA device"),
    "a mask rate": (["data.mask_rate=0.9"], "data.mask_rate"),
    "a decay rate of 1": (["optimizer.betas=[1.0, 0.98]"], "optimizer.betas.0: Input should be less than 1"),
    "a timeout of ages": (["collective_timeout_s=1e30"], "collective_timeout_s: Input should be less than or equal to"),
    "an infinite weight": (["data.dataset=[{path: x, weight: .inf}]"], "weight: Input should be a finite number"),
    "no number": (["steps=many"], "steps: Input should be a valid integer"),
}


def launch_all(plan: Sequence[Sequence[str]], folder: Path) -> list[tuple[int, str]]:
    """Exit code and stderr of the program's own entry, for each list of arguments, one after another in one process."""
    code = (
        "import contextlib, io, json, sys; from pretrain.__main__ import launch\n"
        "results = []\n"
        "for recipe, *overrides in json.load(open(sys.argv[1])):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        code = launch(recipe, overrides, debug=False)\n"
        "    results.append((code, said.getvalue()))\n"
        "json.dump(results, open(sys.argv[1], 'w'))\n"
    )
    file = folder / "plan.json"
    file.write_text(json.dumps([list(map(str, arguments)) for arguments in plan]))
    subprocess.run([sys.executable, "-c", code, str(file)], env=ENVIRONMENT, check=True, timeout=200)
    return json.loads(file.read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def refusals(dataset: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    folder = tmp_path_factory.mktemp("bad")
    plan = [[str(recipe), *train_arguments(dataset, folder / "run"), *given] for given, _ in BAD.values()]
    return dict(zip(BAD, launch_all(plan, folder), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_2(refusals: dict[str, tuple[int, str]], name: str) -> None:
    code, said = refusals[name]
    assert BAD[name][1] in said
    assert code == 2
    assert said.count("\n") == 1


def test_more_ranks_than_rows_is_refused_on_all_ranks(dataset: Path, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = pretrain(recipe, train_arguments(dataset, run, data__global_batch=1), world_size=2)
    assert done.returncode != 0
    assert "data.global_batch: 1 rows cannot be shared by 2 ranks" in done.stderr
    assert not run.exists()
