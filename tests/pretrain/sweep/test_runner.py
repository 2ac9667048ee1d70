"""Trials run one after another, a stop is never forgotten, and a killed process is a failure; with fake trainings."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import train_arguments

from pretrain.recipe import TrainRecipe
from pretrain.sweep import runner
from pretrain.sweep.recipe import Trial
from pretrain.sweep.runner import Stopped, run_all, run_one
from sharebert_common.errors import FAILED, FINISHED, STOPPED, CommandError
from sharebert_common.processes import STARTED_BY, STOP_SIGNALS
from sharebert_common.recipe import load
from sharebert_common.run_files import write_state

FINISH = "(run / 'state.json').write_text('{\"state\": \"finished\"}')"
STOP_WHEN_ASKED = "signal.signal(signal.SIGTERM, lambda *_: os._exit(75))"
SLEEP = "time.sleep(10); (run / 'slept').touch()"
ASK_PARENT = "os.kill(os.getppid(), signal.SIGTERM)"


@pytest.fixture
def three(tmp_path: Path) -> list[Trial]:
    recipe = load(TrainRecipe, None, train_arguments(tmp_path, tmp_path / "unused"))
    return [
        Trial(name, 0, {}, dataclasses.replace(recipe, run=str(tmp_path / "runs" / name))) for name in ("a", "b", "c")
    ]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the training of trial `a` be these lines of Python; the others finish."""

    def set_code(of_a: str) -> None:
        def command(trial: Trial) -> list[str]:
            trial.run.mkdir(parents=True, exist_ok=True)
            lines = of_a if trial.row == "a" else FINISH
            head = f"import os, signal, time; from pathlib import Path; run = Path({str(trial.run)!r})"
            return [sys.executable, "-S", "-c", f"{head}\n{textwrap.dedent(lines)}"]

        monkeypatch.setattr(runner, "_command", command)

    return set_code


def begun(trials: list[Trial]) -> list[str]:
    return [trial.row for trial in trials if trial.run.exists()]


def test_finished_trials_are_left_out(three: list[Trial], train: Callable[[str], None]) -> None:
    train(FINISH)
    three[1].run.mkdir(parents=True)
    write_state(three[1].run, "finished")
    said: list[str] = []
    assert run_all(three, said.append) == FINISHED
    assert said == [f"trial 1 of 3: {three[0].run}", f"trial 3 of 3: {three[2].run}"]


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "killed by SIGTERM"),
        ("os._exit(2)", "failed with exit code 2"),
    ],
)
def test_a_trial_that_fails_or_is_killed_leaves_the_others(
    code: str, how: str, three: list[Trial], train: Callable[[str], None]
) -> None:
    train(code)
    said: list[str] = []
    assert run_all(three, said.append) == FAILED
    assert f"{three[0].run}: {how}" in said
    assert begun(three) == ["a", "b", "c"]
    with pytest.raises(CommandError, match=r"the training in .*/a failed"):
        run_one(three[0], said.append)


@pytest.mark.usefixtures("signals_restored")
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {ASK_PARENT}; {FINISH}", id="at its end"),
        pytest.param(f"{STOP_WHEN_ASKED}; {ASK_PARENT}; {SLEEP}", id="saves"),
        pytest.param(f"{ASK_PARENT}; {SLEEP}", id="before it can save"),
        pytest.param(f"{STOP_WHEN_ASKED}; os.kill(os.getppid(), signal.SIGINT); {SLEEP}", id="Ctrl-C"),
        pytest.param(f"{STOP_WHEN_ASKED}; os.kill(os.getppid(), signal.SIGUSR1); {SLEEP}", id="SLURM's"),
        pytest.param("os._exit(75)", id="the trial alone was asked"),
    ],
)
def test_a_stop_ends_all(code: str, three: list[Trial], train: Callable[[str], None]) -> None:
    before = [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)]
    train(code)
    said: list[str] = []
    assert run_all(three, said.append) == STOPPED
    assert begun(three) == ["a"]
    assert not (three[0].run / "slept").exists(), "the stop was not passed on"
    assert said == [f"trial 1 of 3: {three[0].run}"]
    assert [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGINT)] == before


def test_a_stop_at_the_end_of_the_last_trial_is_not_forgotten(three: list[Trial], train: Callable[[str], None]) -> None:
    """A comparison has more to do after it."""
    train(f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {ASK_PARENT}; {FINISH}")
    with pytest.raises(Stopped):
        run_one(three[0], lambda line: None)


def test_a_stop_before_the_process_of_a_trial_reaches_it(
    three: list[Trial], train: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(SLEEP)
    command = runner._command

    def asked(trial: Trial) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return command(trial)

    monkeypatch.setattr(runner, "_command", asked)
    assert run_all(three, lambda line: None) == STOPPED
    assert begun(three) == ["a"]
    assert not (three[0].run / "slept").exists(), "the stop was not passed on"


def test_a_trial_knows_whose_death_stops_it(three: list[Trial], train: Callable[[str], None]) -> None:
    train(f"(run / 'said').write_text(os.environ[{STARTED_BY!r}])")
    run_all(three, lambda line: None)
    assert (three[0].run / "said").read_text() == str(os.getpid())
