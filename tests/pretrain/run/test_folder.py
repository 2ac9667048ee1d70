"""The run directory: who holds it, how often it crashed, and what is kept of its log."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.run import folder as run_folder
from pretrain.run.folder import RunFolder
from sharebert_common import run_files
from sharebert_common.errors import BadInput
from sharebert_common.processes import STARTED_BY


def start(run: RunFolder, step: int = 0) -> dict[str, Any]:
    tokenizer = run.path / "of-the-dataset.json"
    tokenizer.write_text("{}")
    run.start(step=step, steps=100, tokenizer=tokenizer, recipe_yaml="steps: 100\n", environment={"ranks": 1})
    return run.read_state()


def log(run: RunFolder, *steps: int) -> None:
    with run.log.open("a") as out:
        out.writelines(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.occupy()
    return run


def test_launches_that_died_are_counted_at_the_step_that_they_reached(run: RunFolder) -> None:
    state = start(run)
    assert (state["restarts"], state["crashes"], state["state"]) == (0, {}, "running")
    log(run, 1, 2, 3)
    assert start(run)["crashes"] == {"3": 1}, "killed: it left no word"
    log(run, 1, 2, 3)
    run.fail("RuntimeError: …", crash=True)
    assert run.read_state()["crashes"] == {"3": 2}, "counted at once, so that whoever starts runs can see it"
    assert start(run)["crashes"] == {"3": 2}, "and not once more at the next start"
    log(run, 1, 2, 3, 4)
    state = start(run, step=2)
    assert (state["crashes"], state["restarts"]) == ({"3": 2, "4": 1}, 3)


def test_no_crash_is_counted_where_there_was_none(run: RunFolder) -> None:
    start(run)
    log(run, 1)
    run.write_state("stopped", step=1, reason="signal SIGTERM")
    assert start(run, step=1)["crashes"] == {}
    run.fail("data.dataset: wrong", crash=False)
    assert run.read_state()["crashes"] == {}
    assert start(run, step=1)["crashes"] == {}


def test_without_the_lock_a_failure_is_not_the_runs(run: RunFolder) -> None:
    start(run)
    other = RunFolder(run.path)
    other.fail("in use", crash=False)
    assert run.read_state()["state"] == "running"


def test_the_log_is_cut_where_a_launch_goes_on(run: RunFolder) -> None:
    log(run, 1, 2, 3, 4)
    with run.log.open("a") as out:
        out.write('{"step": 5, "lo')
    run.cut_log(9)
    assert [json.loads(line)["step"] for line in run.log.read_text().splitlines()] == [1, 2, 3, 4]
    run.cut_log(2)
    assert [json.loads(line)["step"] for line in run.log.read_text().splitlines()] == [1, 2]
    with run.log.open("a") as out:
        out.write('{"step": 3}')
    run.cut_log(9)
    assert run.log.read_text().endswith("}\n"), "a line without its end is half a line"


def test_a_launch_from_nothing_cuts_the_whole_log(run: RunFolder) -> None:
    """It validates at step 0 once more."""
    log(run, 0, 1)
    run.cut_log(1)
    assert [json.loads(line)["step"] for line in run.log.read_text().splitlines()] == [0, 1]
    run.cut_log(0)
    assert run.log.read_text() == ""


def holder(path: Path, environment: str) -> subprocess.Popen[str]:
    """A process that holds a run for 2 s; its launcher is a shell, which is killed at once."""
    code = (
        "import sys, time; from pretrain.run.folder import RunFolder\n"
        "run = RunFolder(sys.argv[1]); run.occupy(); print('held', flush=True); time.sleep(2)"
    )
    command = f"{environment} {sys.executable} -c \"$0\" '{path}' & wait"
    return subprocess.Popen(["sh", "-c", command, code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("environment", ["TORCHELASTIC_RUN_ID=x", f"{STARTED_BY}=$$"])
def test_an_attempt_whose_launcher_was_killed_is_waited_for(environment: str, tmp_path: Path) -> None:
    """The launcher is torchrun, or a sweep."""
    with holder(tmp_path, environment) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "held\n"
        with pytest.raises(BadInput, match=f"in use by another attempt of this run .pid .* on {platform.node()}"):
            RunFolder(tmp_path).occupy()
        launcher.kill()
        os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)  # dead, and still listed: a zombie
        started = time.monotonic()
        RunFolder(tmp_path).occupy()
        assert time.monotonic() - started < 60


def test_an_older_attempt_of_the_same_job_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job was requeued while the node of the older one was cut off; another job is refused at once."""
    with holder(tmp_path, "SLURM_JOB_ID=7") as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "held\n"
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        in_use = r"in use by another attempt of this run \(pid .*, job 7 requeued 0\)"
        with pytest.raises(BadInput, match=in_use):
            RunFolder(tmp_path).occupy()
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        with pytest.raises(BadInput, match=in_use):  # a second start inside one allocation
            RunFolder(tmp_path).occupy()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        RunFolder(tmp_path).occupy()


def test_the_lock_of_the_dead_does_not_block(tmp_path: Path) -> None:
    code = "import os, sys; from pretrain.run.folder import RunFolder; RunFolder(sys.argv[1]).occupy(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert (tmp_path / ".lock").read_text().startswith("pid ")
    RunFolder(tmp_path).occupy()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    RunFolder(tmp_path).occupy()
    assert "no locks on this file system (Function not implemented)" in capsys.readouterr().err


def test_a_full_disk_does_not_end_a_start(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(run)
    log(run, 1, 2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for module in (run_folder, run_files):
        monkeypatch.setattr(module, "write_atomically", full)
    start(run, step=1)
    said = capsys.readouterr().err
    for name in ("config.yaml", "environment.json", "state.json"):
        assert f"{name} could not be written (No space left on device)" in said
    assert len(run.log.read_text().splitlines()) == 1


def end(run: RunFolder, state: str) -> None:
    run.write_state(state, step=1)
    os.utime(run.path / "state.json", (2000, 2000))


def test_a_stop_asked_for_before_the_start_is_kept(run: RunFolder) -> None:
    run.stop_file.touch()
    start(run)
    assert run.stop_file.exists(), "a first attempt"
    start(run)
    assert run.stop_file.exists(), "a restart in place, after a crash"
    run.fail("RuntimeError: …", crash=True)
    start(run)
    assert run.stop_file.exists(), "the crash was no end"


@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_a_stop_that_was_carried_out_is_dropped_and_a_newer_one_is_not(run: RunFolder, state: str) -> None:
    start(run)
    run.stop_file.touch()
    os.utime(run.stop_file, (1000, 1000))
    end(run, state)
    start(run)
    assert not run.stop_file.exists()
    end(run, state)
    run.stop_file.touch()
    start(run)
    assert run.stop_file.exists()


def test_a_failure_belongs_to_whoever_holds_the_lock(run: RunFolder) -> None:
    assert run_files.is_held(run.path)
    run.release()
    assert not run_files.is_held(run.path)
    assert not run_files.is_held(run.path / "nowhere")


def test_crashes_are_counted_by_progress_also_where_nothing_was_logged(run: RunFolder) -> None:
    """Ranks that are killed between two log lines, with checkpoints in between, make progress."""
    start(run)
    for step in (5, 10, 15):
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        assert start(run, step=step)["crashes"][str(step)] == 1
    run.fail("RuntimeError: …", crash=True)
    assert run.read_state()["crashes"] == {"5": 1, "10": 1, "15": 2}


class Outage:
    """`state.json` cannot be read for some seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.over, self._read = time.monotonic() + seconds, Path.read_text
        monkeypatch.setattr(Path, "read_text", lambda path, *given, **keys: self.read(path, *given, **keys))

    def read(self, path: Path, *given: Any, **keys: Any) -> str:
        if path.name == run_files.STATE_FILE and time.monotonic() < self.over:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return self._read(path, *given, **keys)


def test_a_state_that_cannot_be_read_for_seconds_ends_nothing(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(run)
    Outage(monkeypatch, 1.0)
    run.write_state("running", step=3)
    assert "state.json could not be written (Input/output error)" in capsys.readouterr().err
    assert start(run, step=4)["step"] == 4
    Outage(monkeypatch, 1.0)
    run.end("finished", step=9)
    assert (run.read_state()["state"], run.read_state()["step"]) == ("finished", 9)
    Outage(monkeypatch, 1.0)
    run.fail("OSError: …", crash=True)
    assert run.read_state()["state"] == "failed"


def test_a_state_that_somebody_broke_does_not_end_a_training(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    start(run)
    (run.path / run_files.STATE_FILE).write_text("{")
    run.write_state("running", step=3)
    assert "state.json: not JSON" in capsys.readouterr().err


def test_the_tokenizer_is_copied_bit_for_bit(run: RunFolder) -> None:
    """An export compares its checksum with the dataset's, whatever its line ends."""
    given = run.path / "given.json"
    given.write_bytes(b'\xef\xbb\xbf{\r\n"a": 1\r}\n')
    run.start(step=0, steps=1, tokenizer=given, recipe_yaml="", environment={})
    assert run.tokenizer.read_bytes() == given.read_bytes()


def test_leftovers_of_killed_writes_are_removed(run: RunFolder) -> None:
    for name in (".state.json.12-34", ".config.yaml.12-34", ".tokenizer.json.12-34"):
        (run.path / name).touch()
    start(run)
    assert not [path.name for path in run.path.iterdir() if path.name.startswith(".") and path.name != ".lock"]
