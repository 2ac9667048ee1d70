"""Trains the trials of a sweep, each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from pretrain.recipe import TrainRecipe
from pretrain.sweep.recipe import Trial, differing_keys
from sharebert_common.errors import FAILED, FINISHED, STOPPED, BadInput, CommandError
from sharebert_common.files import make_folders, write_atomically
from sharebert_common.processes import StopSignals, environment_for_child
from sharebert_common.recipe import load, to_yaml
from sharebert_common.run_files import peek_state

SETTLED = ("run", "data.micro_batch")
"""Keys that may differ in `config.yaml` of a run: its folder may have been moved, and it picks a number for `auto`. How
rows are cut into micro-batches changes no loss but for rounding."""

STOPPED_EARLY = (-signal.SIGTERM, -signal.SIGINT)
"""Codes of a training that was asked to stop before it could note that: it has nothing to save."""


class Stopped(CommandError):
    """A stop was asked for; what the training saved is gone on with when the command runs again."""

    exit_code = STOPPED


def is_finished(trial: Trial) -> bool:
    """Whether its run has reached its last step."""
    return bool(peek_state(trial.run)["state"] == "finished")


def refuse_other_keys(trials: Sequence[Trial]) -> None:
    """Raise BadInput, naming the run and the keys, where a run was begun with others than its trial has.

    A finished one would be left out, and its row show what was asked before; another one would go on with the new keys,
    and its row show a mixture.
    """
    for trial in trials:
        config = trial.run / "config.yaml"
        if not config.is_file() and not is_finished(trial):
            continue
        changed = [key for key in differing_keys(load(TrainRecipe, config), trial.recipe) if key not in SETTLED]
        if changed:
            raise BadInput(
                f"{trial.run}: was trained with other keys ({', '.join(changed)}); remove it, or give another folder"
            )


def run_all(trials: Sequence[Trial], report: Callable[[str], None]) -> int:
    """Train all trials that are not finished yet; one that was stopped or killed resumes.

    A trial that fails, or whose process is killed, is reported, and the others still run. SIGTERM, SIGUSR1, SIGUSR2 and
    Ctrl-C stop the trial that runs, which saves; a second Ctrl-C ends it at once. A trial also stops where this process
    dies.

    Returns FINISHED, FAILED where some trial failed, or STOPPED where this process or a trial was asked to stop, also
    where it came too late for the last trial: the caller may have more to do.
    """
    failed, child = 0, _Child()
    with StopSignals(child.stop, interrupt=True) as signals:
        for number, trial in enumerate(trials, 1):
            if signals.received is not None:
                break
            if is_finished(trial):
                continue
            report(f"trial {number} of {len(trials)}: {trial.run}")
            code = child.run(_command(trial), signals)
            if code == STOPPED:
                return STOPPED
            if code != FINISHED and not (signals.received is not None and code in STOPPED_EARLY):
                failed += 1
                report(f"{trial.run}: {_how_it_failed(code)}")
    if signals.received is not None:  # looked at here, where no later signal can be noted and forgotten
        return STOPPED
    return FAILED if failed else FINISHED


def run_one(trial: Trial, report: Callable[[str], None]) -> None:
    """Train a trial to its end, as `run_all` does.

    Raises Stopped: this process or the training was asked to stop; CommandError: the training failed.
    """
    code = run_all([trial], report)
    if code == STOPPED:
        raise Stopped("a stop was asked for; run the command again to go on")
    if code != FINISHED:
        raise CommandError(f"the training in {trial.run} failed; its messages stand above")


class _Child:
    """The process of the trial that runs."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str], signals: StopSignals) -> int:
        """Run a command to its end; its exit code, minus the number of a signal that killed it."""
        self._process = subprocess.Popen(command, env=environment_for_child())
        if signals.received is not None:  # while there was no process to pass it on to
            self.stop()
        return self._process.wait()

    def stop(self) -> None:
        """Ask the process to stop, if there is one. It may be called in a signal handler."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)


def _command(trial: Trial) -> list[str]:
    """The command that trains a trial; its recipe is written for it."""
    recipe = trial.run.parent.parent / "recipes" / f"{trial.run.name}.yaml"
    make_folders(recipe.parent)
    write_atomically(recipe, to_yaml(trial.recipe))
    return [sys.executable, "-m", "pretrain", str(recipe)]


def _how_it_failed(code: int) -> str:
    return f"failed with exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
