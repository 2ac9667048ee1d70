"""What may change between two launches of a run is taken and reported; what may not is refused with both values."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import make_dataset, retokenize
from tiny_runs import log_of, train_arguments

from pretrain.checkpoint.identity import report_changes

SECRET = "hunter2-is-no-secret"

LAUNCH_ALL = '''
import contextlib, io, json, os, sys
from pathlib import Path
from pretrain.__main__ import launch

def listens():
    """The addresses at which this process takes connections."""
    fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    mine = {os.readlink(fd) for fd in fds if os.path.exists(fd)}
    tables = [Path(f"/proc/self/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return [fields[1] for fields in rows if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine]

from pretrain import distributed
from pretrain import train as training
world = distributed.join(120)  # DeepSpeed does not come back once its process group is gone
distributed.join, distributed.leave = lambda timeout_s: world, lambda: None
step = training.Trainer.step

def watched(self, number, batch):
    ports.update(listens())
    return step(self, number, batch)

training.Trainer.step = watched
plan, results = json.load(open(sys.argv[1])), []
for umask, overrides in plan:
    os.umask(umask)
    ports = set()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = launch(None, overrides, debug=False)
    results.append((code, said.getvalue(), sorted(ports)))
json.dump(results, open(sys.argv[1], "w"))
'''


def launch_all(
    folder: Path, plan: Sequence[Sequence[str]], umasks: Sequence[int] = ()
) -> list[tuple[int, str, list[str]]]:
    """Exit code, stderr and open ports of the program's own entry, for each list of arguments, in one process."""
    file = folder / "plan.json"
    masks = list(umasks) or [0o022] * len(plan)
    file.write_text(json.dumps([[mask, list(given)] for mask, given in zip(masks, plan, strict=True)]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET}
    environment["NCCL_DEBUG_FILE"] = "made-up"
    subprocess.run([sys.executable, "-c", LAUNCH_ALL, str(file)], env=environment, check=True, timeout=280)
    return [(code, said, ports) for code, said, ports in json.loads(file.read_text())]


@pytest.fixture(scope="module")
def folder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("changed")


@pytest.fixture(scope="module")
def results(dataset: Path, folder: Path) -> dict[str, tuple[int, str, list[str]]]:
    """All launches, by name; those that are refused leave the run as it was."""
    run, mixed, shorter = folder / "run", folder / "mixed", folder / "shorter"
    shorter.mkdir()
    (shorter / "stop").touch()  # its first attempt ends after a step
    other = make_dataset(folder / "other", seed=1)
    more = make_dataset(folder / "more", train_rows=288)
    retokenized = retokenize(make_dataset(folder / "retokenized"))

    def given(run: Path, **changes: Any) -> list[str]:
        extra = changes.pop("extra", [])
        return [*train_arguments(dataset, run, **{"steps": 2} | changes), *extra]

    def mixture(weight: float) -> list[str]:
        return [f"data.dataset=[{{path: {dataset}, weight: 1}}, {{path: {other}, weight: {weight}}}]"]

    plan = {
        "first": given(run),
        "other dataset": given(run, steps=4, data__dataset=other),
        "other tokenizer": given(run, steps=4, data__dataset=retokenized, data__may_change=True),
        "other vocabulary": given(run, steps=4, model__vocab_size=320),
        "other shape": given(run, steps=4, model__num_hidden_layers=3),
        "other seed": given(run, steps=4, seed=5),
        "other settings": given(run, steps=4, optimizer__lr=1e-3, data__global_batch=12),
        "too few steps": given(run, steps=3, optimizer__lr=1e-3, data__global_batch=12),
        "added shards": given(run, steps=6, data__dataset=more, data__may_change=True),
        "once more": given(run, steps=8, data__dataset=more),
        "mixture": given(mixed, extra=mixture(1.0)),
        "other weights": given(mixed, steps=4, extra=mixture(3.0)),
        "other weights, as asked": given(mixed, steps=4, extra=[*mixture(3.0), "data.may_change=true"]),
        "private": given(folder / "private"),
        "many steps": given(shorter, steps=8),
        "fewer steps": given(shorter, steps=2),
    }
    umasks = [0o077 if name == "private" else 0o022 for name in plan]
    return dict(zip(plan, launch_all(folder, list(plan.values()), umasks), strict=True))


REFUSED = {
    "other dataset": r"written with data fingerprint \w+ \(window_shards 16\), this run has \w+ .*data.may_change=true",
    "other tokenizer": r"made with tokenizer_sha256 '\w{64}', this recipe has '\w{64}'",
    "other vocabulary": r"made with model.vocab_size 304, this recipe has 320",
    "other shape": r"made with model.num_hidden_layers 2, this recipe has 3",
    "other seed": r"written with data seed 0, this run has 5",
    "too few steps": r"steps: 3, and the newest checkpoint of \S+run is of step 4; give 4 or more, or delete",
    "other weights": r"written with data fingerprint \w+ x 1 \+ \w+ x 1 .*, this run has \w+ x 16385 \+ \w+ x 49151",
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_world_is_refused_with_both_values(results: dict[str, Any], name: str) -> None:
    code, said, _ = results[name]
    assert code == 2
    assert re.search(REFUSED[name], said), said
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1


def test_other_settings_are_taken_and_reported(results: dict[str, Any], folder: Path) -> None:
    code, said, _ = results["other settings"]
    assert code == 0
    for change in (
        "optimizer.lr was 0.003, is now 0.001",
        "steps was 2, is now 4",
        "data.global_batch was 10, is now 12",
    ):
        assert f"the recipe changed: {change}" in said
    lines = log_of(folder / "run")
    assert [line["rows"] for line in lines[:4]] == [10, 20, 32, 44]
    assert lines[2]["lr"] < 1e-3


def test_added_shards_are_taken_where_the_recipe_asks_for_it(results: dict[str, Any], folder: Path) -> None:
    code, said, _ = results["added shards"]
    assert code == 0
    assert re.search(r"the data changed: \w+ .* before step 4, \w+ .* from now on, from row 44 of the new order", said)
    code, said, _ = results["once more"]
    assert code == 0, "its checkpoint was made with the new data"
    assert "the data changed" not in said
    assert [line["step"] for line in log_of(folder / "run")] == list(range(1, 9))


def test_changed_mixture_weights_are_taken_where_the_recipe_asks_for_it(results: dict[str, Any], folder: Path) -> None:
    code, said, _ = results["other weights, as asked"]
    assert code == 0
    assert "the data changed: " in said
    assert [line["step"] for line in log_of(folder / "mixed")] == [1, 2, 3, 4]


def test_fewer_steps_than_before_are_taken(results: dict[str, Any], folder: Path) -> None:
    """As long as the checkpoint has no more."""
    assert results["many steps"][0] == 75
    code, said, _ = results["fewer steps"]
    assert code == 0
    assert "the recipe changed: steps was 8, is now 2" in said
    assert [line["step"] for line in log_of(folder / "shorter")] == [1, 2]


def test_each_start_is_recorded(results: dict[str, Any], folder: Path) -> None:
    starts = json.loads((folder / "run" / "environment.json").read_text())
    assert len(starts) == 4
    assert starts[0]["packages"]["torch"] == importlib.metadata.version("torch")
    assert starts[0]["variables"]["NCCL_DEBUG_FILE"] == "made-up"
    assert starts[0]["cpu"]["count"] == os.cpu_count()
    assert starts[0]["commit"]
    assert starts[0]["hosts"] == [os.uname().nodename]
    assert starts[0]["deepspeed"]["zero_optimization"]["stage"] == 1


def test_no_secret_of_the_environment_is_written_anywhere(results: dict[str, Any], folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    assert all(SECRET not in said for _, said, _ in results.values())


def test_modes_respect_the_umask(results: dict[str, Any], folder: Path) -> None:
    for name, of_file, of_folder in (("run", 0o644, 0o755), ("private", 0o600, 0o700)):
        paths = list((folder / name).rglob("*"))
        assert len(paths) > 10
        for path in paths:
            assert path.stat().st_mode & 0o777 == (of_folder if path.is_dir() else of_file), path


def test_a_process_alone_listens_on_loopback_only(results: dict[str, Any]) -> None:
    ports = [port for _, _, ports in results.values() for port in ports]
    assert ports, "gloo listens"
    assert all(port.startswith("0100007F:") or port.startswith("0" * 24 + "01000000:") for port in ports), ports


def test_changes_of_any_depth_are_reported(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    said: list[str] = []
    report_changes(config, {"a": 1}, said.append)
    config.write_text("a: 1\nb: {c: 2, d: [1, 2]}\n")
    report_changes(config, {"a": 1, "b": {"c": 3, "d": [1, 2]}, "e": "new"}, said.append)
    assert said == ["the recipe changed: b.c was 2, is now 3", "the recipe changed: e was None, is now 'new'"]


def test_a_run_whose_checkpoints_cannot_be_read_is_left_as_it_is(
    results: dict[str, Any], dataset: Path, folder: Path, tmp_path: Path
) -> None:
    """Another program's newer format, for instance: nothing is trained, cut or deleted, unless it was asked for."""
    run = tmp_path / "run"
    shutil.copytree(folder / "private", run)
    manifest = run / "checkpoints" / "step-00000002" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    given = train_arguments(dataset, run, steps=4)
    refused, anew = launch_all(tmp_path, [given, [*given, "checkpoint.restart_if_unreadable=true"]])
    code, said, _ = refused
    assert code == 2
    assert "checkpoint format 2, this program reads 1" in said
    assert "checkpoint.restart_if_unreadable=true" in said
    code, said, _ = anew
    assert code == 0
    assert "continuing from step 0; step-00000002 will make way for the next checkpoint" in said
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4]


def test_the_log_of_a_refused_run_is_not_cut(
    results: dict[str, Any], dataset: Path, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "private", run)
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    (run / "checkpoints" / "step-00000002").mkdir()
    log = (run / "log.jsonl").read_bytes()
    ((code, said, _),) = launch_all(tmp_path, [train_arguments(dataset, run, steps=4)])
    assert code == 2
    assert "manifest.json: missing" in said
    assert (run / "log.jsonl").read_bytes() == log
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("step")] == ["step-00000002"]
