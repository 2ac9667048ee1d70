"""The cluster recipe: which values it refuses, and which options sbatch gets."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.allocation import PORTS, port_of
from cluster.launch import Training, after_setup
from cluster.prep import PrepTask
from cluster.recipe import ClusterRecipe, load_cluster, minutes
from cluster.submit import dry_run, sbatch_parameters, submit, submit_prep, training_of
from sharebert_common.errors import BadInput
from sharebert_common.recipe import parse


@dataclass
class Data:
    """The part `data` of a train recipe."""

    dataset: list[Any] = field(default_factory=list)


@dataclass
class TrainRecipe:
    """What a submission looks at in a train recipe."""

    run: str
    data: Data


def training(**keys: object) -> Training:
    recipe = parse(ClusterRecipe, keys, "test")
    return Training(run=Path("/runs/a"), module=("pretrain", "/runs/a/cluster/train.yaml"), datasets=(), recipe=recipe)


def test_shipped_recipes_are_found_by_name() -> None:
    assert load_cluster("slurm", ["nodes=8"]).nodes == 8
    assert load_cluster("local", []).launcher == "local"


def test_a_time_that_yaml_reads_as_a_number_is_refused(tmp_path: Path) -> None:
    """YAML's 24:00:00 is 86,400, and 86,400 minutes are two months."""
    file = tmp_path / "mine.yaml"
    file.write_text("time: 24:00:00\n")
    with pytest.raises(BadInput, match="time: 86400 is a number; write the time in quotes"):
        load_cluster(str(file), [])
    file.write_text("time: '24:00:00'\n")
    assert load_cluster(str(file), []).time == "24:00:00"


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("1:30", 2), ("24:00:00", 1440), ("2-00:00:00", 2880), ("1-12", 2160), ("1-0:30", 1470)],
)
def test_times_as_slurm_writes_them(time: str, expected: int) -> None:
    assert minutes(time) == expected


@pytest.mark.parametrize("time", ["soon", "1:2:3:4", "-5", "1h"])
def test_other_times_are_refused(time: str) -> None:
    with pytest.raises(BadInput, match="write it as SLURM does"):
        minutes(time)


def test_an_unknown_key_and_an_impossible_launcher_are_refused() -> None:
    with pytest.raises(BadInput, match="gpu_per_node: unknown key; did you mean 'gpus_per_node'"):
        parse(ClusterRecipe, {"gpu_per_node": 8}, "test")
    with pytest.raises(BadInput, match="this machine is one node"):
        parse(ClusterRecipe, {"launcher": "local", "nodes": 2}, "test")


def test_the_batch_script_asks_for_what_the_recipe_says() -> None:
    said = dry_run(
        training(
            nodes=4,
            gpus_per_node=8,
            time="24:00:00",
            partition="gpu",
            account="nlp",
            qos="long",
            memory="500G",
            constraint="h100",
            exclude="n[7-8]",
            sbatch={"reservation": "mine", "exclusive": True},
            env={"NCCL_DEBUG": "WARN"},
            setup=["rsync -a /data/corpus $TMPDIR/"],
        )
    )
    for option in (
        "nodes=4",
        "gpus-per-node=8",
        "time=24:00:00",
        "partition=gpu",
        "account=nlp",
        "qos=long",
        "mem=500G",
        "constraint=h100",
        "exclude='n[7-8]'",
        "reservation=mine",
        "exclusive",
        "requeue",
        "ntasks-per-node=1",
        "cpus-per-task=32",
        "signal=USR2@120",
        "job-name=a",
    ):
        assert f"#SBATCH --{option}\n" in said, option
    assert "--cpus-per-task=32 " in said, "srun does not take it from the job since 22.05"
    assert "--kill-on-bad-exit=1" in said
    assert "--nproc-per-node=8" in said
    assert "rsync -a /data/corpus $TMPDIR/\nexport NCCL_DEBUG=WARN\n" in said


def test_a_key_of_sbatch_wins() -> None:
    assert "#SBATCH --time=5\n" in dry_run(training(time="60", sbatch={"time": 5}))
    given = {"cpus-per-task": 2, "gpus-per-node": "a100:4", "job_name": "mine", "open-mode": "truncate"}
    said = dry_run(training(cpus_per_process=32, gpus_per_node=8, sbatch=given))
    lines = [line for line in said.splitlines() if line.startswith("#SBATCH")]
    for line in ("cpus-per-task=2", "gpus-per-node=a100:4", "job-name=mine", "open-mode=truncate"):
        name = line.partition("=")[0]
        assert [found for found in lines if f"--{name}=" in found][-1:] == [f"#SBATCH --{line}"], "the last one wins"
    assert sum("per-" in line for line in lines) == 3, "none is there twice"
    assert "--cpus-per-task=2 " in said, "srun takes the same"
    assert "--cpus-per-task=256" not in said


@pytest.mark.parametrize("nothing", [False, None])
def test_a_key_of_sbatch_takes_an_option_back(nothing: bool | None) -> None:
    keys = ("requeue", "cpus-per-task", "gpus_per_node", "time", "job-name", "qos", "unheard-of")
    said = dry_run(training(gpus_per_node=8, time="60", qos="long", sbatch=dict.fromkeys(keys, nothing)))
    script = said.partition("# command")[0]
    for key in keys:
        assert key.replace("_", "-") not in script.partition("# setup")[0]
    assert "--cpus-per-task" not in said
    assert "--nodes=1\n" in script


def test_containers() -> None:
    said = dry_run(training(gpus_per_node=1, container={"image": "/images/a b.sif", "options": ["--bind=/data"]}))
    assert " apptainer exec --nv --bind=/data '/images/a b.sif' python -u -m submitit.core._submit " in said
    pyxis = sbatch_parameters(training(container={"image": "x", "kind": "pyxis"}).recipe, "a", Path("/runs"))
    assert "--container-image=x" in pyxis["srun_args"]


def test_ports_are_below_those_of_outgoing_connections() -> None:
    ports = [port_of(job) for job in range(1, 5001)]
    assert len({*ports, *(port + 1 for port in ports)}) == 10_000
    assert min(ports) >= PORTS.start
    assert max(ports) + 1 < PORTS.stop


def test_an_interpreter_in_a_folder_with_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my env").mkdir()
    python = tmp_path / "my env" / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    assert after_setup(["export MODE=fast"], {"PATH": "/usr/bin:/bin"})["MODE"] == "fast"
    assert f"'{python}' -u -m submitit" in dry_run(training())


@pytest.mark.parametrize("name", ["run%j", "100%", "%", "a%5Ab"])
def test_a_percent_sign_that_slurm_would_replace_is_refused(name: str, tmp_path: Path) -> None:
    recipe = TrainRecipe(run=str(tmp_path / name / "x"), data=Data())
    if name in ("100%", "%"):
        assert training_of(recipe, ClusterRecipe()).run == tmp_path / name / "x"
    else:
        with pytest.raises(BadInput, match="use a path without '%'"):
            training_of(recipe, ClusterRecipe())
        with pytest.raises(BadInput, match="use a path without '%'"):
            submit_prep([], tmp_path / name, 2, ClusterRecipe())


def test_prep_asks_for_no_gpus_and_runs_with_the_python_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[tuple[list[PrepTask], dict[str, Any]]] = []

    def take(tasks: list[PrepTask], recipe: ClusterRecipe, folder: Path, parameters: dict[str, Any]) -> list[str]:
        submitted.append((tasks, parameters))
        return ["7_0"]

    monkeypatch.setattr("cluster.submit._submit", take)
    submit_prep(["corpus"], tmp_path / "out", 2, load_cluster("slurm", ["nodes=3"]))
    assert [len(tasks) for tasks, _ in submitted] == [3, 3, 1]
    assert all((given["gpus_per_node"], given["cpus_per_task"]) == (None, 8) for _, given in submitted)
    assert [task.arguments for task in submitted[0][0]][1:] == [("corpus", "--task=1/3"), ("corpus", "--task=2/3")]
    assert submitted[2][0][0].arguments == ("corpus",)


def test_one_directory_by_two_names_is_one_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    recipes = [TrainRecipe(run=str(tmp_path / name), data=Data()) for name in ("run", "link")]
    with pytest.raises(BadInput, match="several recipes name the same directory"):
        submit(recipes, ClusterRecipe())


def test_setup_runs_as_shell_lines_and_leaves_its_environment(tmp_path: Path) -> None:
    lines = [f"echo staged > {tmp_path}/file; echo said", "export MODE=fast", "cd /"]
    assert after_setup(lines, {"PATH": "/usr/bin:/bin"})["MODE"] == "fast"
    assert (tmp_path / "file").read_text() == "staged\n"
    with pytest.raises(BadInput, match="setup: exit code 1"):
        after_setup(["false", "true"], {"PATH": "/usr/bin:/bin"})


def test_a_process_that_setup_leaves_behind_is_not_waited_for() -> None:
    """A daemon, for instance."""
    began = time.monotonic()
    assert after_setup(["sleep 20 & echo $!", "export MODE=fast"], {"PATH": "/usr/bin:/bin"})["MODE"] == "fast"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("line", ["exit 0", "exec true"])
def test_a_line_of_setup_that_ends_the_shell_is_refused(line: str) -> None:
    with pytest.raises(BadInput, match="setup: a line ended the shell"):
        after_setup([line], {"PATH": "/usr/bin:/bin"})
