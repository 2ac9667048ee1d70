"""Killed anywhere and started again with the same command, a run has the losses of one that nothing happened to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import MASKS, log_of, losses, torchrun, train_arguments, train_many

from pretrain.checkpoint import format as checkpoint

pytestmark = pytest.mark.slow

STEPS = 60
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": MASKS
    | {
        "optimizer__muon__generated": True,
        "optimizer__ema__decay": 0.9,
        "validate__ema": True,
        "data__row_length__first": 8,
        "data__row_length__whole_from": 1.0,  # rows are short whenever the kill comes
    },
}
"""What a run has beside `arguments`, by its name."""
LAUNCH = str(Path(__file__).parent / "faulty_launch.py")


def arguments(dataset: Path, run: Path, **overrides: Any) -> list[str]:
    keys = {"steps": STEPS, "checkpoint__every": 8, "model__hidden_dropout_prob": 0.1, "validate__every": 20}
    return train_arguments(dataset, run, **keys | overrides)


@contextmanager
def launched(recipe: str, given: list[str], *, restarts: int = 0, **world: str) -> Iterator[subprocess.Popen[str]]:
    """A launch on two ranks, in a process group of its own, of which nothing is left afterwards."""
    with subprocess.Popen(
        torchrun(2, LAUNCH, recipe, *given, restarts=restarts),
        env=os.environ | {"OMP_NUM_THREADS": "1"} | world,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            for pid in [*workers_of(process.pid), process.pid]:
                kill(pid)
            process.communicate()


def last_words(process: subprocess.Popen[str], timeout_s: float = 250) -> str:
    """What a launch said until its end; fails the test with that where the end does not come."""
    try:
        return process.communicate(timeout=timeout_s)[1]
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"did not end; it said: {(error.stderr or b'')[-4000:]!r}")


def workers_of(launcher: int) -> list[int]:
    """Its children, in the order of their ranks."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    except FileNotFoundError:
        return []
    found = {}
    for child in map(int, children):
        try:
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        world_size = [int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")]
        found |= {world_size[0]: child} if world_size else {}
    return [found[rank] for rank in sorted(found)]


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], Any], timeout_s: float = 200.0, pause_s: float = 0.02) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause_s)


def steps_logged(run: Path) -> int:
    try:
        return len(losses(run))
    except (FileNotFoundError, ValueError):
        return 0


def state_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "state.json").read_text()))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text("precision: fp32\n")
    return str(file)


@pytest.fixture(scope="module")
def undisturbed_runs(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of each entry of OPTIONS."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_many([{"overrides": arguments(dataset, folder / name, **OPTIONS[name])} for name in OPTIONS], 2, folder)
    return folder


@pytest.fixture
def undisturbed(undisturbed_runs: Path) -> Path:
    return undisturbed_runs / "plain"


def finish(recipe: str, given: list[str]) -> str:
    with launched(recipe, given) as process:
        said = last_words(process)
        assert process.returncode == 0, said[-4000:]
    return said


def assert_same(run: Path, undisturbed: Path) -> None:
    def curve(folder: Path) -> list[tuple[Any, ...]]:
        keys = ("step", "rows", "loss", "accuracy", "lr", "grad_norm", "valid_loss", "valid_accuracy")
        return [tuple(line.get(key) for key in keys) for line in log_of(folder)]

    assert len(losses(run)) == STEPS
    assert curve(run) == curve(undisturbed)
    assert state_of(run)["state"] == "finished"


@pytest.mark.parametrize("name", OPTIONS)
def test_one_rank_is_killed(dataset: Path, recipe: str, undisturbed_runs: Path, tmp_path: Path, name: str) -> None:
    """torchrun starts the group again by itself."""
    run = tmp_path / "run"
    with launched(recipe, arguments(dataset, run, **OPTIONS[name]), restarts=2) as process:
        wait_for(lambda: steps_logged(run) > 20)
        kill(workers_of(process.pid)[1])
        said = last_words(process)
        assert process.returncode == 0, said[-4000:]
    assert_same(run, undisturbed_runs / name)
    assert state_of(run)["restarts"] == 1
    assert state_of(run)["resumed_from"] >= 8
    ((step, count),) = state_of(run)["crashes"].items()
    assert 20 < int(step) <= STEPS
    assert count == 1


def test_all_are_killed_in_the_middle_of_a_checkpoint(
    dataset: Path, recipe: str, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with launched(recipe, arguments(dataset, run), SLOW_FSYNC_S="0.5") as process:
        wait_for(lambda: list(run.glob("checkpoints/.step-00000024.*")), pause_s=0.002)
        for pid in [process.pid, *workers_of(process.pid)]:
            kill(pid)
    assert list(run.glob("checkpoints/.step-00000024.*"))
    newest = checkpoint.newest_whole(run / "checkpoints", print)
    assert newest is not None
    assert newest.step in (8, 16)
    assert state_of(run)["state"] == "running"
    finish(recipe, arguments(dataset, run))
    assert_same(run, undisturbed)
    assert list(state_of(run)["crashes"].values()) == [1]


def test_the_launcher_is_killed(dataset: Path, recipe: str, undisturbed: Path, tmp_path: Path) -> None:
    """Its ranks stop and save; a launch that comes at once waits for them, and goes on."""
    run = tmp_path / "run"
    with launched(recipe, arguments(dataset, run), SLOW_FSYNC_S="0.3") as process:
        wait_for(lambda: steps_logged(run) > 20)
        kill(process.pid)
        process.wait()
        finish(recipe, arguments(dataset, run))
    assert_same(run, undisturbed)
    assert state_of(run)["crashes"] == {}


def test_signals_in_bursts_also_during_a_save(dataset: Path, recipe: str, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with launched(recipe, arguments(dataset, run), SLOW_FSYNC_S="0.3") as process:
        wait_for(lambda: list(run.glob("checkpoints/.step-00000016.*")), pause_s=0.002)
        workers = workers_of(process.pid)
        while process.poll() is None:
            for pid in workers:
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                    try:
                        os.kill(pid, number)
                    except ProcessLookupError:
                        continue
            time.sleep(0.01)
        assert process.returncode == 0
    state = state_of(run)
    assert state["state"] == "stopped"
    assert state["reason"].startswith("signal SIG")
    assert 16 <= state["step"] <= 20
    assert checkpoint.newest_whole(run / "checkpoints", print).step == state["step"]  # type: ignore[union-attr]
    finish(recipe, arguments(dataset, run))
    assert_same(run, undisturbed)


def test_a_signal_before_the_first_step_is_not_lost(dataset: Path, recipe: str, tmp_path: Path) -> None:
    """It comes while libraries are imported; the launch makes one step, saves, and says so."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pretrain", recipe, *arguments(dataset, run)]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        taken = Path(f"/proc/{process.pid}/status")
        usr1 = 1 << (signal.SIGUSR1 - 1)
        wait_for(lambda: int(taken.read_text().partition("SigCgt:")[2].split()[0], 16) & usr1, pause_s=0.005)
        process.send_signal(signal.SIGUSR1)
        process.wait(timeout=120)
    assert process.returncode == 75
    assert state_of(run)["state"] == "stopped"
    assert state_of(run)["step"] == 1


def test_a_full_disk_ends_no_run(dataset: Path, recipe: str, undisturbed: Path, tmp_path: Path) -> None:
    """Two checkpoints cannot be written; older ones stay, and later ones are written."""
    run, full = tmp_path / "run", tmp_path / "full"
    with launched(recipe, arguments(dataset, run), FULL_DISK=str(full)) as process:
        wait_for(lambda: (run / "checkpoints" / "step-00000008").exists(), pause_s=0.002)
        full.touch()
        wait_for(lambda: steps_logged(run) > 33)
        assert checkpoint.newest_whole(run / "checkpoints", print).step <= 32  # type: ignore[union-attr]
        full.unlink()
        said = last_words(process)
        assert process.returncode == 0, said[-4000:]
    assert "No space left on device; it is tried again in 0.5 s" in said
    assert "given up ([Errno 28] No space left on device); older checkpoints are untouched" in said
    assert_same(run, undisturbed)
    assert checkpoint.newest_whole(run / "checkpoints", print).step == STEPS  # type: ignore[union-attr]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_rank_that_hangs_is_named(dataset: Path, recipe: str, tmp_path: Path, frozen: bool) -> None:
    run = tmp_path / "run"
    given = arguments(dataset, run, faults__hang_s=8)
    with launched(recipe, given, **({} if frozen else {"HANG": "1 9"})) as process:
        if frozen:
            wait_for(lambda: steps_logged(run) > 5)
            os.kill(workers_of(process.pid)[1], signal.SIGSTOP)
        said = last_words(process)
    assert process.returncode != 0
    state = state_of(run)
    assert state["state"] == "failed"
    assert "rank 0 has not moved for" in said
    assert "rank 0: thread MainThread" in said
    if frozen:
        assert "frozen or gone: rank 1 (on" in state["reason"]
    else:
        assert "behind the others: rank 1 (at: step 9, forward)" in state["reason"]
        assert "rank 1: thread MainThread" in said
        assert "in stand_still" in said
