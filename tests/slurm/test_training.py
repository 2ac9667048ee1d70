"""An undisturbed run on the cluster, from `sharebert submit` to the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from slurm.runs import BASELINE_STEPS, RECIPE, Run
from slurm.slurm_cluster import SlurmCluster
from tiny_runs import losses, train_arguments

from pretrain.recipe import TrainRecipe
from sharebert_common.recipe import load, to_yaml

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_two_nodes_train_to_the_end(undisturbed: Run, baseline: list[float]) -> None:
    """Four ranks on two nodes write one log, one curve in TensorBoard and one checkpoint."""
    assert len(baseline) == BASELINE_STEPS
    assert baseline[-1] < 0.95 * baseline[0], "it learns"
    assert undisturbed.steps_of_each_attempt() == [list(range(1, BASELINE_STEPS + 1))]
    assert undisturbed.folder.checkpoint == BASELINE_STEPS
    (start,) = json.loads((undisturbed.path / "environment.json").read_text())
    assert start["ranks"] == 4
    (entry,) = undisturbed.folder.attempts
    assert len(set(entry["nodes"])) == 2


def test_the_preflight_says_what_it_measured(undisturbed: Run) -> None:
    said = undisturbed.sharebert("logs", str(undisturbed.path), "--no-follow")
    assert "pre-flight: all-reduce of 8 MiB over 4 cpu ranks: right," in said
    assert "GB/s" in said
    assert "pre-flight: 2 nodes reach each other" in said
    assert f"step {BASELINE_STEPS}/{BASELINE_STEPS}" in said, "rank 0 is in the log"


def test_status_of_a_finished_run(undisturbed: Run) -> None:
    lines = undisturbed.sharebert("status", str(undisturbed.path)).splitlines()
    facts = {key: value.strip() for key, _, value in (line.partition(" ") for line in lines)}
    assert facts["state"] == "finished"
    assert facts["step"] == f"{BASELINE_STEPS} of {BASELINE_STEPS}"
    assert facts["attempts"] == "1"
    assert 0 < float(facts["goodput"].rstrip("%")) < 100
    assert str(undisturbed.path) in undisturbed.sharebert("status"), "the list of all runs"


def test_dry_run_prints_what_a_submission_sends(undisturbed: Run, tmp_path: Path) -> None:
    """It is the same script except for the folder, with a torchrun command."""
    other = Run(undisturbed.slurm, undisturbed.dataset, tmp_path)
    other.path = undisturbed.path
    said = other.sharebert(*other.submission("--set=preflight=true", "--time=20"), "--dry-run")
    (script,) = undisturbed.folder.jobs.glob("*/*_submission.sh")
    assert said.startswith(script.read_text().rstrip())
    assert "-m torch.distributed.run --nnodes=2 --nproc-per-node=2 --max-restarts=3" in said
    assert "--rdzv-endpoint=FIRST_NODE:PORT" in said


def test_a_queued_run_is_not_submitted_twice_and_can_be_stopped(run: Run, slurm: SlurmCluster) -> None:
    job = run.submit("--set=sbatch.hold=true")
    with pytest.raises(RuntimeError, match=f"job {job} of this run is pending"):
        run.submit()
    assert "queued" in run.sharebert("status", str(run.path))
    assert "was taken out of the queue" in run.sharebert("stop", str(run.path))
    slurm.wait_for_state(job, "CANCELLED")


def test_a_batch_that_the_ranks_do_not_divide(run: Run, tmp_path: Path, dataset: Path) -> None:
    """11 rows on 4 ranks are 3 + 3 + 3 + 2; the losses are those of one process."""
    run.finish(run.submit(steps=30, data__global_batch=11))
    alone = Run(run.slurm, dataset, tmp_path / "alone")
    alone.finish(alone.submit("--procs-per-node=1", nodes=1, steps=30, data__global_batch=11))
    assert losses(run.path) == pytest.approx(losses(alone.path), rel=1e-4)


def test_several_recipes_are_an_array(run: Run, tmp_path: Path, dataset: Path) -> None:
    """Each is a run of its own with a job of its own; interpolation gives each its directory."""
    recipes = []
    for name, rate in (("fast", 3e-3), ("slow", 1e-4)):
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"run: {tmp_path}/{name}\noptimizer:\n  lr: {rate}\nfaults:\n  memory_probe: false\n")
        recipes.append(str(file))
    given = [
        word for word in train_arguments(dataset, run.path, steps=10) if not word.startswith(("run=", "optimizer"))
    ]
    said = run.sharebert("submit", *recipes, *given, f"--cluster={run.cluster}", "--procs-per-node=1")
    jobs = [line.split()[-1] for line in said.splitlines()]
    array = jobs[0].split("_")[0]
    assert jobs == [f"{array}_0", f"{array}_1"]
    for job, name in zip(jobs, ("fast", "slow"), strict=True):
        run.slurm.wait_for_state(job, "COMPLETED", "FAILED", explain=run.tail)
        said = run.sharebert("status", str(tmp_path / name))
        assert "state     finished" in said
        assert f"job       {job} (completed)" in said
    assert losses(tmp_path / "fast") != losses(tmp_path / "slow")


def test_a_sweep_submits_the_trials_that_are_left(run: Run, tmp_path: Path, dataset: Path) -> None:
    """Those whose run is finished or has a job already are not submitted again."""
    base = tmp_path / "base.yaml"
    keys = train_arguments(dataset, tmp_path / "unused", steps=10, faults__memory_probe=False, validate__every=10)
    base.write_text(to_yaml(load(TrainRecipe, None, keys)))
    out, cluster = tmp_path / "out", RECIPE.replace("procs_per_node: 2", "procs_per_node: 1")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        json.dumps({"folder": str(out), "base": str(base), "arms": {"a": {}, "b": {"optimizer.lr": 1e-4}}})
    )

    def submitted() -> dict[str, str]:
        lines = run.sharebert("sweep", str(sweep), f"--submit={run.cluster}").splitlines()
        jobs = [line.removeprefix(f"{out}/runs/").split(",seed=0: job ") for line in lines]
        return dict(jobs) if lines[0].startswith(str(out)) else {}

    run.cluster.write_text(cluster + "sbatch: {hold: true}\n")
    array = submitted()
    assert array == {"a": array["a"], "b": array["a"].replace("_0", "_1")}
    assert submitted() == {}
    run.sharebert("stop", str(out / "runs" / "a,seed=0"))
    run.cluster.write_text(cluster)
    again = submitted()
    assert list(again) == ["a"]
    run.slurm.wait_for_state(again["a"], "COMPLETED", "FAILED", explain=run.tail)
    assert submitted() == {}
    run.sharebert("stop", str(out / "runs" / "b,seed=0"))
    table = run.sharebert("sweep", str(sweep), "--table")
    assert "| a | 1 |" in table
    assert table.endswith("1 trials are not finished\n")
