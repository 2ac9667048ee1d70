"""A stop that is asked for early, and ranks whose launcher is killed before they have joined."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import log_of, train_arguments

from pretrain.faults.stop import StopRequest
from sharebert_common import processes


def train(dataset: Path, run: Path) -> int:
    recipe = run.with_name("tiny.yaml")
    recipe.write_text("faults:\n  memory_probe: false\n")
    command = [sys.executable, "-m", "pretrain", str(recipe), *train_arguments(dataset, run, steps=4)]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode


def test_a_stop_made_before_the_first_launch_stops_it(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    assert train(dataset, run) == 75
    state = json.loads((run / "state.json").read_text())
    assert (state["state"], state["reason"]) == ("stopped", "file 'stop'")
    assert state["step"] <= 1
    assert train(dataset, run) == 0, "the request was carried out, and the run resumes"
    assert [line["step"] for line in log_of(run) if "loss" in line] == [1, 2, 3, 4]


@pytest.mark.usefixtures("signals_restored")
def test_ctrl_c_asks_for_a_stop(capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGINT)
    assert (stop.asked, stop.reason) == (True, "signal SIGINT")
    assert "saving; Ctrl-C again ends at once" in capfd.readouterr().err


@pytest.mark.usefixtures("signals_restored")
def test_a_file_system_that_does_not_answer_asks_for_no_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest()
    stop.watch(tmp_path / "stop")
    (tmp_path / "stop").touch()
    assert stop.asked

    def stale(*_: object, **__: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "stat", stale)
    assert not stop.asked
    monkeypatch.undo()
    stop.close()


LAUNCHER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-m", "pretrain", sys.argv[1]])
print(worker.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of its parent's death")
def test_a_rank_that_waits_for_the_others_dies_with_its_launcher(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run: {tmp_path}/run\ndata: {{dataset: {tmp_path}, global_batch: 2, micro_batch: 1}}\n")
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    environment = os.environ | group | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", LAUNCHER, str(recipe)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        worker = int(launcher.stdout.readline())
        deadline = time.monotonic() + 60
        while not listens(port):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        launcher.kill()
    deadline = time.monotonic() + 20
    while alive(worker):
        assert time.monotonic() < deadline, "it waits for a rank of the next launch"
        time.sleep(0.1)


ORPHAN_AT_BIRTH = """
import os, sys, time
if os.fork():
    os._exit(0)
time.sleep(1)  # the parent has been gone for long
from pretrain.faults.stop import die_with_the_launcher
die_with_the_launcher()
print("lives on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a process of its parent's death")
def test_a_rank_whose_launcher_died_before_its_first_line_ends() -> None:
    processes._prctl(processes._SET_CHILD_SUBREAPER, 0)  # other tests let this process adopt orphans
    command = ["sh", "-c", f"{sys.executable} -c '{ORPHAN_AT_BIRTH}'"]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == ""


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
