"""`sharebert submit --cluster local`: the whole path on this machine, through submitit's local executor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import log_of, train_arguments

from cluster.folder import ClusterFolder
from cluster.scheduler import is_over
from pretrain.run.folder import RunFolder

pytestmark = pytest.mark.slow


def sharebert(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_STATE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sharebert_cli", *arguments]
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=False, timeout=120)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_stop_and_go_on(dataset: Path, tmp_path: Path) -> None:
    """A run that is stopped and submitted again resumes. Status and logs are looked at on the way."""
    run, recipe = tmp_path / "run", tmp_path / "tiny.yaml"
    recipe.write_text("faults:\n  memory_probe: false\n")
    marks = tmp_path / "marks"
    flags = ["--cluster=local", "--procs-per-node=2", f"--set=setup=['echo $MARK >> {marks}']", "--set=env.MARK=seen"]
    arguments = train_arguments(dataset, run, steps=100_000, schedule__warmup=10, schedule__decay="constant")
    done = sharebert(tmp_path, "submit", str(recipe), *arguments, *flags)
    assert done.returncode == 0, done.stderr
    folder = ClusterFolder(run)
    job = done.stdout.split()[-1]
    wait_for(lambda: folder.log and folder.log[-1]["step"] > 5)
    assert "state     running" in sharebert(tmp_path, "status", str(run)).stdout
    again = sharebert(tmp_path, "submit", str(recipe), *arguments, *flags)
    assert again.returncode == 2
    assert f"job {job} of this run is running" in again.stderr

    assert "will save and end" in sharebert(tmp_path, "stop", str(run)).stdout
    wait_for(lambda: is_over(job, "local"))
    state = json.loads((run / "state.json").read_text())
    assert state["state"] == "stopped"
    assert state["step"] == folder.checkpoint == folder.log[-1]["step"]

    steps = state["step"] + 20
    arguments = train_arguments(dataset, run, steps=steps, schedule__warmup=10, schedule__decay="constant")
    done = sharebert(tmp_path, "submit", str(recipe), *arguments, *flags, "--set=preflight=false")
    job = done.stdout.split()[-1]
    wait_for(lambda: is_over(job, "local"))
    assert [line["step"] for line in log_of(run)] == list(range(1, steps + 1))
    said = sharebert(tmp_path, "status", str(run)).stdout
    assert "state     finished" in said
    assert "attempts  2" in said
    assert f"step {steps}/{steps}" in sharebert(tmp_path, "logs", str(run)).stdout
    assert marks.read_text() == "seen\nseen\n"
    assert str(run) in sharebert(tmp_path, "status").stdout


def test_a_run_that_trains_elsewhere_is_refused_once(dataset: Path, tmp_path: Path) -> None:
    """The workers are not restarted, and the state of the other attempt stays as it is."""
    run, recipe = RunFolder(tmp_path / "run"), tmp_path / "tiny.yaml"
    recipe.write_text("precision: fp32\n")
    run.occupy()
    run.write_state("running", step=7)
    arguments = train_arguments(dataset, run.path)
    done = sharebert(tmp_path, "submit", str(recipe), *arguments, "--cluster=local", "--set=preflight=false")
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[-1]
    wait_for(lambda: is_over(job, "local"))
    folder = ClusterFolder(run.path)
    assert (folder.state["state"], folder.state["step"]) == ("running", 7)
    assert not (folder.jobs / job / "requeue").exists()
    said = "\n".join(file.read_text() for file in folder.jobs.glob("*/*.out"))
    assert "in use by another attempt of this run" in said
    assert not list(folder.workers.rglob("attempt_1")), "torchrun started the workers again"


def test_a_folder_where_it_is_submitted_hides_no_package(dataset: Path, tmp_path: Path) -> None:
    """This happens in the parent of the clone, for instance; the job runs `python -m` there."""
    for name in ("sharebert", "cluster", "pretrain"):
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / "__init__.py").touch()
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("faults:\n  memory_probe: false\n")
    arguments = train_arguments(dataset, tmp_path / "run", steps=1)
    command = [Path(sys.executable).with_name("sharebert"), "submit", recipe, *arguments, "--cluster=local"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"XDG_STATE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--set=preflight=false"], cwd=tmp_path / "here", env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    wait_for(lambda: is_over(done.stdout.split()[-1], "local"))
    assert ClusterFolder(tmp_path / "run").state["state"] == "finished"


def test_what_is_wrong_is_said_at_once(tmp_path: Path, dataset: Path) -> None:
    arguments = train_arguments(dataset, tmp_path / "run")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("precision: fp32\n")
    for given, expected in (
        (["--cluster=locl"], "cluster/locl: no such recipe; did you mean 'cluster/local'?"),
        (["--cluster=local", "--nodes=2"], "this machine is one node"),
        (["--cluster=local", "--set=setpu=x"], "setpu: unknown key; did you mean 'setup'?"),
        (["--cluster=local", "stepps=3"], "stepps: unknown key; did you mean 'steps'?"),
    ):
        done = sharebert(tmp_path, "submit", str(recipe), *arguments, *given)
        assert done.returncode == 2
        assert expected in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
